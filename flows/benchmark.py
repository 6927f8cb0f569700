"""One model on one suite: fetch it, score it (on the GPU pool where there is one), log it to MLflow."""

from prefect import flow, task
from prefect.logging import get_run_logger

from flows.merge import score_all
from flows.pools import gpu_deployment
from flows.report import short_name
from flows.steps import fetch, several_at_once
from tasks import stages
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import load_suite
from tasks.orchestration.credentials import use_blocks
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.run_log import hide_tracebacks_of_user_errors
from tasks.orchestration.shown import show_mlflow, show_table
from tasks.pages.scores import of_one
from tasks.settings import Device, Places, places
from tasks.stages import Subject
from tasks.storage.watch import identity_of_source, is_intact
from tasks.tracking.merge import LoggedRun, log_benchmark

hide_tracebacks_of_user_errors()


@task(name="log", task_run_name="log {name}", retries=2, retry_delay_seconds=10)
def log_scores(
    name: str, subject: Subject, fingerprint: str, scores: ModelScores, where: Places, tracking_uri: str | None
) -> LoggedRun:
    """Log the scores to MLflow; finds the run of an earlier try."""
    return log_benchmark(
        name, source=subject.location or "", digest=subject.digest, fingerprint=fingerprint, scores=scores,
        tracking_uri=tracking_uri, root=where.tracking,
    )  # fmt: skip


@flow(
    name="benchmark", flow_run_name="benchmark {model}", task_runner=several_at_once(), persist_result=False,
    on_cancellation=[cancel_children], on_crashed=[cancel_children],
)  # fmt: skip
def benchmark_flow(
    model: str,
    suite: str = "public",
    data_dir: str | None = None,
    limit: int | None = None,
    device: Device = "auto",
    tracking_uri: str | None = None,
    gpu: str | None = None,
) -> dict[str, float | None]:
    """Score one model on every capability of a suite.

    Args:
        model: A checkpoint: s3://…, a folder, or a Hugging Face id (org/name@revision).
        suite: Benchmark suite: a name in deployments/suites or a file.
        data_dir: Data of a local suite: a folder or s3://….
        limit: Documents per task, for a quick look.
        device: What to compute on; auto: cuda where there is one.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
        gpu: Deployment that benchmarks are sent to; OTA_GPU_DEPLOYMENT, or none: they run in this process.
    """
    use_blocks()
    where, gpu = places(), gpu or gpu_deployment()
    stages.check_suite(load_suite(suite), stages.bring_data(data_dir, where), limit)
    identity = identity_of_source(model)
    fetched = fetch(model, identity, where)
    if not is_intact(fetched):  # Prefect remembers a copy that has left the cache
        fetched = fetch.with_options(refresh_cache=True)(model, identity, where)
    name = short_name(model)
    subject = Subject(name=name, role="model", path=fetched.path, digest=fetched.digest, location=fetched.resolved)
    refs = score_all({"model": subject}, suite, data_dir, limit, where, device=device, gpu=gpu)
    scores = stages.read_scores(where, refs["model"])
    logged = log_scores(name, subject, refs["model"].fingerprint, scores, where, tracking_uri)
    show_table(of_one(name, scores), "scores")
    show_mlflow(name, logged.url)
    get_run_logger().info("scores of %s: %s", model, scores.by_capability())
    return scores.by_capability()
