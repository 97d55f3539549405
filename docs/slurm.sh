#!/bin/bash
# Two machines of four GPUs; the job ends itself two minutes before its time is up, queues again and goes on.
#
#   sbatch docs/slurm.sh
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# The folder is on a file system that all machines share, and its name stays when the job is queued again. What is in it
# is gone on with; Lightning finds the ranks in SLURM's environment.
srun lit-sigsoftmax fit --config wikitext2/lstm.yaml \
    --trainer.num_nodes 2 --trainer.devices 4 --trainer.strategy ddp \
    --data.batch_size 40 --checkpoint.dirpath "runs/$SLURM_JOB_ID"
code=$?

if [ "$code" -eq 143 ]; then # it wrote a checkpoint because it was told to stop
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
