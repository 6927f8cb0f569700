"""Names in MLflow that dashboards rely on. They are defaults of commands, too, so that importing this costs nothing."""

EXPERIMENT = "ota-merging"
REGISTERED_MODEL = "ota-merged"
