"""The page of the MLflow UI that compares: runs grouped by output layer, sorted by perplexity."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["HOST", "PORT", "comparison_url", "experiment_tags", "study_tags"]

HOST, PORT = "127.0.0.1", 5000
_VIEW = "head-to-head"


def comparison_url(tracking_uri: str, experiment_id: str, study: str | None = None, port: int = PORT) -> str:
    """Return the address of the page that compares: on the server, or where ``ui`` serves a local store.

    Args:
        tracking_uri: The store.
        experiment_id: The experiment.
        study: Only the runs of this study; all training runs of the experiment by default.
        port: Where ``ui`` serves.
    """
    host = tracking_uri.rstrip("/") if tracking_uri.startswith("http") else f"http://{HOST}:{port}"
    return f"{host}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={_key(study)}"


def experiment_tags() -> dict[str, str]:
    """Return the tags that give an experiment its view of all training runs."""
    return {f"mlflow.sharedViewState.{_VIEW}": json.dumps(_view("tags.kind = 'fit'"))}


def study_tags(study: str) -> dict[str, str]:
    """Return the tags that give an experiment its view of one study."""
    query = f"tags.kind = 'fit' and tags.study = '{study}'"
    return {f"mlflow.sharedViewState.{_key(study)}": json.dumps(_view(query))}


def _key(study: str | None) -> str:
    return f"{_VIEW}-{re.sub('[^A-Za-z0-9]+', '-', study)}" if study else _VIEW


def _view(query: str) -> dict[str, Any]:
    # MLflow's own format of a shared view, which it does not document: a view that a later version cannot read is
    # shown as the plain run list.
    card = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False, "metricSectionId": "head-to-head"}
    line = {
        "type": "LINE",
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "selectedXAxisMetricKey": "",
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
        "useGlobalXaxisKey": False,
        "ignoreOutliers": False,
        "range": {},
        "yAxisKey": "metric",
        "selectedYAxisMetricKey": "",
        "yAxisExpressions": [],
    }

    def bar(key: str, title: str) -> dict[str, Any]:
        return {**card, "type": "BAR", "uuid": key, "metricKey": key, "displayName": title}

    def curve(key: str, title: str, scale: str) -> dict[str, Any]:
        keys = {"uuid": key, "metricKey": key, "selectedMetricKeys": [key], "displayName": title, "scaleType": scale}
        return {**card, **line, **keys}

    columns = [f"metrics.`{name}`" for name in ("test/perplexity", "val/best_perplexity", "train/tokens_per_second")]
    columns += ["tags.`seed`", "attributes.`Duration`", "attributes.`Created`", "tags.`study`"]
    return {
        "searchFilter": query,
        "orderByKey": "metrics.`test/perplexity`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOWALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]},
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [
            {
                "uuid": "head-to-head",
                "name": "Head to head",
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
                "columns": 2,
                "cardHeight": 420,
            }
        ],
        "compareRunCharts": [
            bar("test/perplexity", "Test perplexity (mean over seeds)"),
            bar("train/tokens_per_second", "Training tokens per second"),
            curve("val/perplexity", "Validation perplexity", "log"),
            curve("train/loss", "Training loss, nats per token", "linear"),
        ],
    }
