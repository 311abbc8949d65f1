"""The runs that benchmarks/soak_kills.py kills: training, evaluation and conversion of the smallest random model."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.soak_source import make_model, named

STEPS, ACCUMULATED, SAVED = 12, 2, 2
ROOT = Path(__file__).resolve().parents[1]


class Losses(Callback):
    """Writes a line per micro-batch and rank to ``losses.RANK.jsonl`` in the trainer's folder."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {"batch": batch_idx, "loss": outputs["loss"].item().hex(), "documents": batch["document_ids"]}
        with (Path(trainer.default_root_dir) / f"losses.{trainer.global_rank}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def prepare(folder: Path) -> None:
    """Paths of the model, its GGUF file and the configuration."""
    make_model(folder / "model")
    _write_gguf(folder / "model.gguf")
    (folder / "train.yaml").write_text(yaml.safe_dump(_training(str(folder / "model"))))


def training(folder: Path, output: Path, ranks: int, last: bool) -> list[str]:
    """The command that trains into ``output``."""
    more = ["--ckpt_path=last"] if last else []
    return [
        *(sys.executable, "train.py", "fit", f"--config={folder}/train.yaml", "--merge"),
        *(f"--trainer.default_root_dir={output}", f"--trainer.logger.save_dir={output}", *_ranks(ranks), *more),
    ]


def evaluation(folder: Path, output: Path, ranks: int) -> list[str]:
    """The command that measures into ``output``."""
    return [
        *(sys.executable, "evaluate.py", "test", "--config=configs/evaluate/niah.yaml", f"--model.output={output}"),
        *(f"--model.backbone.pretrained={folder}/model", "--model.backbone.dtype=float32", "--trainer.accelerator=cpu"),
        *("--trainer.precision=32-true", "--data.lengths=[512]", "--data.depths=[0.2,0.5,0.8]", "--data.batch_size=2"),
        *("--data.cases_per_cell=4", f"--trainer.logger.save_dir={output}", *_ranks(ranks)),
    ]


def conversion(folder: Path, output: Path) -> list[str]:
    """The command that converts into ``output``."""
    code = "import sys; from pathlib import Path; from sparsekv_pl.models.gguf_checkpoint import convert; "
    return [sys.executable, "-c", f"{code}convert(*map(Path, sys.argv[1:]))", f"{folder}/model.gguf", str(output)]


def _ranks(ranks: int) -> list[str]:
    return [f"--trainer.devices={ranks}", f"--trainer.strategy={'ddp' if ranks > 1 else 'auto'}"]


def _training(model: str) -> dict[str, Any]:
    presses = [named("kvpress.SnapKVPress", window_size=8), named("sparsekv_pl.presses.BlockDropoutPress")]
    press = named("sparsekv_pl.presses.EvictionAugPress", presses=presses)
    growing = named("sparsekv_pl.schedules.Linear", start=0.4, end=0.8, steps=STEPS)
    schedule = named("sparsekv_pl.schedules.Spread", low=0.1, schedule=growing)
    module = named(
        "sparsekv_pl.training.eit_module.EITModule",
        backbone={"pretrained": model, "dtype": "float32", "lora": {"r": 4}},
        eviction=named("sparsekv_pl.eviction.real.RealEviction", press=press),
        optimizer=named("torch.optim.AdamW", lr=1e-2),
    )
    data = named(
        "data.mixture.EvictionData", context_tokens=96, continuation_tokens=16, batch_size=2, retrieval_share=0.0
    )
    trainer = {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_epochs": -1,
        "max_steps": STEPS,
        "accumulate_grad_batches": ACCUMULATED,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "logger": named("lightning.pytorch.loggers.TensorBoardLogger", save_dir=".", name="", version=""),
        "callbacks": [
            named("callbacks.curriculum.Curriculum", schedule=schedule),
            named("callbacks.checkpoint.SafeCheckpoint", every_n_train_steps=SAVED),
            named("benchmarks.soak_kills_source.Losses"),
        ],
    }
    return {"seed_everything": 0, "model": module, "data": data, "trainer": trainer}


def _write_gguf(path: Path) -> None:
    """Write a GGUF file of a random two-layer Llama with a byte vocabulary and the metadata of SmolLM2's file."""
    import numpy as np
    from gguf import GGUFWriter, TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th"]
    writer, rng, hidden = GGUFWriter(path, "llama"), np.random.default_rng(0), 32
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(words) - 3))
    writer.add_token_merges(["t h"])
    for role, number in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(number)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(words), hidden), "output_norm": (hidden,)}
    for layer in range(2):
        square, halved, wide = (hidden, hidden), (16, hidden), (64, hidden)
        own: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": square}
        own |= {"attn_k": halved, "attn_v": halved, "attn_output": square, "ffn_gate": wide, "ffn_up": wide}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (own | {"ffn_down": (hidden, 64)}).items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


__all__ = ["ACCUMULATED", "ROOT", "STEPS", "Losses", "conversion", "evaluation", "prepare", "training"]
