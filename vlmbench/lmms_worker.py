"""The process that imports lmms-eval, whose imports change their host: ``python -m vlmbench.lmms_worker``.

It replaces loguru's sinks and the process-group time-out, sets a flag of PIL, ends the process for a missing video, and retries
faults until they are hidden. All of that stays here; requests and answers are JSON lines on stdin and stdout (`OPS`). A task
is found by its YAML file alone, since the package's own scan of 1,900 files takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEEDS = 3
"""Of a scorer that guesses when it cannot read: with that many the same, its score is taken for a fact."""


class Served:
    """One task, with its documents (`open`) or with its scorer alone (`scorer`)."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.task: Any = None
        self.docs: Any = ()

    def open(self, task: str, root: str | None, rows: str | None) -> dict[str, Any]:
        """Build the task; its documents without their media. `root` becomes ``HF_HOME``, where tasks look for videos."""
        if root is not None:
            os.environ["HF_HOME"] = root  # read when the task's module is executed, below
        config = self.config = load_config(task)
        if config.get("output_type", "generate_until") != "generate_until":
            raise ValueError(f"its output type is {config['output_type']}, and only generate_until can be run here")
        split = config.get("test_split") or config.get("validation_split")
        if files := found_rows(task, root, rows):
            config |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {split: files}}}
            config.pop("dataset_name", None)
        from lmms_eval.api.task import ConfigurableTask

        self.task = ConfigurableTask(config=config, model_name="vlmbench")
        self.docs = self.task.test_docs() if self.task.has_test_docs() else self.task.validation_docs()
        limits = self.task.config.generation_kwargs or {}
        return {
            "docs": [self._told(number) for number in range(len(self.docs))],
            "max_new_tokens": limits.get("max_new_tokens"),
            "rows": files,
        }

    def _told(self, number: int) -> dict[str, Any]:
        doc = self.docs[number]
        target = self.task.doc_to_target(doc)
        media = [
            {"kind": "video", "path": each} if isinstance(each, str) else {"kind": "image", "path": None}
            for each in self._visuals(doc)
        ]
        cluster = doc.get(self.config.get("cluster_key") or "")
        return {
            "text": str(self.task.doc_to_text(doc)),
            "answer": str(target[0] if isinstance(target, (list, tuple)) and target else target),
            "media": media,
            "cluster": None if cluster is None else str(cluster),
        }

    def _visuals(self, doc: Any) -> list[Any]:
        found = self.task.doc_to_visual(doc) or []
        return found if isinstance(found, list) else [found]

    def media(self, doc: int, paths: list[str]) -> None:
        """Write a document's pictures."""
        pictures = [each for each in self._visuals(self.docs[doc]) if not isinstance(each, str)]
        for picture, path in zip(pictures, paths, strict=True):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            part = f"{path}.{os.getpid()}.part"
            picture.convert("RGB").save(part, "PNG")
            os.replace(part, path)

    def score(self, doc: int, text: str) -> dict[str, Any]:
        return self._rated(self.docs[doc], text)

    def scorer(self, task: str) -> None:
        """The scorer of a task, for `rate`; no data set is touched."""
        self.config = load_config(task)

    def rate(self, row: dict[str, Any], text: str) -> dict[str, Any]:
        return self._rated(row, text)

    def _rated(self, doc: Any, text: str) -> dict[str, Any]:
        """``{"value": 0 to 1, "prediction", "random"}``, of the task's first metric."""
        for stop in (self.config.get("generation_kwargs") or {}).get("until") or ():
            text = text.split(stop)[0] if stop else text
        found = []
        for seed in range(SEEDS):
            random.seed(seed)
            copy = (
                json.loads(json.dumps(doc)) if self.task is None else dict(doc)
            )  # theirs rewrite the answers in place
            found.append(self._once(copy, text))
        return {**found[0], "random": found[1:] != found[:-1]}

    def _once(self, doc: Any, text: str) -> dict[str, Any]:
        if self.task is not None:  # below the decorator that would try again and say nothing but that
            plain = type(self.task).process_results.__wrapped__
            results, metrics = plain(self.task, doc, [text]), self.task.aggregation()
        else:
            results, metrics = self._of_config(doc, text)
        name = next(name for name in metrics if name in results and name != "submission")
        value, record = results[name], results[name]
        if not isinstance(value, (int, float)):
            value = metrics[name]([record])
        read = next((record[key] for key in PREDICTIONS if key in record), None) if isinstance(record, dict) else None
        value = float(value)
        return {"value": value / 100 if value > 1 else value, "prediction": text.strip() if read is None else str(read)}

    def _of_config(self, doc: Any, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the task would, from its configuration alone."""
        aggregate: dict[str, Any] = {each["metric"]: each.get("aggregation") for each in self.config["metric_list"]}
        if callable(process := self.config.get("process_results")):
            return process(doc, [text.strip()]), aggregate
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        (metric,) = self.config["metric_list"]
        options = {key: value for key, value in metric.items() if key.startswith("ignore_")}
        answer = doc[self.config["doc_to_target"]]
        return dict(exact_match_hf_evaluate(references=[answer], predictions=[text.strip()], **options)), aggregate


PREDICTIONS = ("pred_answer", "parsed_pred", "pred", "prediction")
OPS: dict[str, Callable[..., Any]] = {
    "open": Served.open, "media": Served.media, "score": Served.score, "scorer": Served.scorer, "rate": Served.rate,
}  # fmt: skip


def load_config(task: str) -> dict[str, Any]:
    """The merged configuration of a task, found without a scan. Raises `LookupError` with near names."""
    import difflib
    import importlib.util

    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("lmms_eval")
    names: dict[str, Path] = {}
    for path in sorted((Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml")):
        if found := re.search(r"""(?m)^task:\s*["']?([\w.\-]+)["']?\s*(?:#.*)?$""", path.read_text(encoding="utf-8")):
            names.setdefault(found[1], path)
    if not names:
        raise LookupError(
            "the installed lmms-eval holds no task files, as versions before 0.7.3; install lmms-eval>=0.7.3"
        )
    if task not in names:
        near = ", ".join(difflib.get_close_matches(task, names, n=3, cutoff=0.4)) or "see lmms-eval's own list"
        raise LookupError(f"lmms-eval has no task {task!r} of its own, or it is a group (near: {near})")
    from lmms_eval.utils import load_yaml_config

    return dict(load_yaml_config(str(names[task]), mode="full"))


def found_rows(task: str, root: str | None, rows: str | None) -> list[str]:
    """Parquet files below `root`: those of the pattern `rows`, else those in a folder of the task's name."""
    if root is None:
        return []
    for pattern in (rows,) if rows else (f"{task}/*.parquet", f"{task}/*/*.parquet"):
        if files := sorted(str(path) for path in Path(root).glob(pattern)):
            return files
    if rows:
        raise LookupError(f"{root} holds no file {rows}")
    return []


def said(error: BaseException) -> str:
    """The reason behind a retry, in one line."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    error = inner or error
    text = " ".join(str(error).split())[:400]
    return text if type(error) in (LookupError, ValueError, SystemExit) and text else f"{type(error).__name__}: {text}"


def main() -> None:
    """Serve requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed must not get between the answers
    served = Served()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": OPS[request.pop("op")](served, **request)}
        except (Exception, SystemExit) as error:
            answer = {"error": said(error)}
        out.write(json.dumps(answer, default=str) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
