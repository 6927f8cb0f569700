"""One model on one suite: fetch it, score it (on the GPU pool where there is one), log it to MLflow."""

from prefect import flow
from prefect.logging import get_run_logger

from tasks.benchmark import Benchmark
from tasks.evaluation.kept import read_scores
from tasks.evaluation.subject import fetched_subject
from tasks.job import fetch, score_all
from tasks.log import log_scores
from tasks.merging.composed import one_model
from tasks.merging.labels import short_name
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.executors import executor_of, gpu_deployment
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import several_at_once
from tasks.orchestration.shown import show_mlflow, show_table
from tasks.pages.scores import of_one
from tasks.settings import Address, Device, places


@for_users
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
    tracking_uri: Address | None = None,
    gpu: str | None = None,
    server: Address | None = None,
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
        server: URL of an OpenAI-style server that serves the model under its name, such as http://host:8000/v1.
    """
    where, gpu = places(), gpu or gpu_deployment()
    benchmark = Benchmark.of(suite, data_dir, limit, where, server).check()
    executor = executor_of(gpu, device)
    fetched = one_model(model, lambda source: fetch([source], where)[0])
    subject = fetched_subject(short_name(model), "model", fetched)
    (ref,) = score_all({"model": subject}, benchmark, where, executor).values()
    scores = read_scores(where, ref)
    logged = log_scores(subject, ref.fingerprint, scores, where, tracking_uri, benchmark.data_digest, data_dir)
    show_table(of_one(subject.name, scores), "scores")
    show_mlflow(subject.name, logged.url)
    get_run_logger().info("scores of %s: %s", model, scores.by_capability())
    return scores.by_capability()
