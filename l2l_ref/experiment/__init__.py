"""The paper's experiment: meta-train, tune the baselines, transfer, evaluate, report."""
