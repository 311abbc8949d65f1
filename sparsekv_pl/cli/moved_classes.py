"""Class paths of version 0.1.0 in users' YAML: each is refused with its new path. To be removed in 0.3.0."""

import re

MOVED = {
    "data.haystack.HaystackData": "data.long_haystack.HaystackData",
    "sparsekv_pl.analyses.anchors.AnchorAnalysis": "sparsekv_pl.analysis.anchor_attention.AnchorAnalysis",
    "sparsekv_pl.analyses.collection.TensorCollection": "sparsekv_pl.blocksparse.collection.TensorCollection",
    "sparsekv_pl.analyses.comparison.BlockComparison": "sparsekv_pl.blocksparse.comparison.BlockComparison",
    "sparsekv_pl.analyses.oracle.OracleBlocks": "sparsekv_pl.analysis.oracle_blocks.OracleBlocks",
    "sparsekv_pl.analyses.statistics.AttentionStatisticsAnalysis": (
        "sparsekv_pl.analysis.statistics_analysis.AttentionStatisticsAnalysis"
    ),
    "sparsekv_pl.analyses.validation.SketchWalkValidation": "sparsekv_pl.blocksparse.validation.SketchWalkValidation",
    "sparsekv_pl.anchors.Anchors": "sparsekv_pl.models.anchors.Anchors",
    "sparsekv_pl.backbone.Backbone": "sparsekv_pl.models.backbone.Backbone",
    "sparsekv_pl.eviction.chunked.ChunkedEviction": "sparsekv_pl.eviction.real.RealEviction",
    "sparsekv_pl.eviction.setting.Setting": "sparsekv_pl.evaluation.points.Setting",
    "sparsekv_pl.hosted_client.HostedModel": "sparsekv_pl.evaluation.hosted_client.HostedModel",
    "sparsekv_pl.lora.Lora": "sparsekv_pl.models.lora.Lora",
    "sparsekv_pl.modules.eit.EITModule": "sparsekv_pl.training.eit_module.EITModule",
    "sparsekv_pl.modules.evaluation.EvaluationModule": "sparsekv_pl.evaluation.evaluation_module.EvaluationModule",
    "sparsekv_pl.modules.gate_distillation.GateDistillation": (
        "sparsekv_pl.blocksparse.gate_distillation.GateDistillation"
    ),
    "sparsekv_pl.modules.harness.HarnessModule": "sparsekv_pl.evaluation.lm_eval_module.LMEvalModule",
    "sparsekv_pl.modules.hosted.HostedModule": "sparsekv_pl.evaluation.hosted_module.HostedModule",
    "sparsekv_pl.modules.long_context.LongContextModule": "sparsekv_pl.evaluation.long_context.LongContextModule",
    "sparsekv_pl.objectives.alignment.SelectionObjective": "sparsekv_pl.objectives.SelectionObjective",
    "sparsekv_pl.objectives.tokens.EIT": "sparsekv_pl.objectives.EIT",
    "sparsekv_pl.objectives.tokens.LM": "sparsekv_pl.objectives.LM",
    "sparsekv_pl.objectives.tokens.SparseLM": "sparsekv_pl.objectives.SparseLM",
    "sparsekv_pl.placement.Placement": "sparsekv_pl.models.placement.Placement",
}
OLD_PATH = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, MOVED))})(?!\w)")


def moved(line: str) -> str:
    """Replace an error line that names an old class path by the key and the new path; return others unchanged.

    >>> moved("model: Problem with given class_path 'sparsekv_pl.lora.Lora': No module named 'sparsekv_pl.lora'")
    'model: sparsekv_pl.lora.Lora moved in version 0.2.0: write sparsekv_pl.models.lora.Lora'
    """
    found = OLD_PATH.search(line)
    if found is None:
        return line
    key = re.match(r"[\w.]+: ", line)
    return f"{key[0] if key else ''}{found[1]} moved in version 0.2.0: write {MOVED[found[1]]}"
