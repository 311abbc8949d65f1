"""What a later step or the first validation could not run is refused at setup, before the first step."""

import pytest
from kvpress import BasePress, ChunkKVPress, ComposedPress, FinchPress, KnormPress, KVzipPress, LUKVPress, ThinKPress

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import LM, Mixed, Reconstruction
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize(
    ("press", "message"),
    [
        (
            ChunkKVPress(KnormPress()),
            r"ChunkKV\(Knorm\) evicts from one row alone, and a batch has 2, .*batch_size=1",
        ),
        (KVzipPress(), r"KVzip evicts from one row alone"),
        (FinchPress(), "Finch selects by the question, which is read after the eviction here"),
        (LUKVPress(KnormPress()), r"LUKV\(Knorm\) cannot evict from LlamaForCausalLM: No LU-KV budget curve found"),
        (EvictionAugPress([KnormPress(), LUKVPress(KnormPress())]), "No LU-KV budget curve found"),
        (ThinKPress(), "ThinK has no compression_ratio to set"),
        (EvictionAugPress([KnormPress(), ComposedPress([KnormPress()])]), "Composed.* has no compression_ratio to set"),
    ],
)
def test_a_press_that_cannot_evict_from_the_datas_batches(
    press: BasePress,
    message: str,
    validates: bool,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
) -> None:
    presses = (KnormPress(), press) if validates else (press, KnormPress())
    eviction, validation = map(RealEviction, presses)
    trainer = tiny_trainer(Curriculum(Fixed(0.5)))
    with pytest.raises(ValueError, match=message):
        trainer.fit(EITModule(tiny_backbone(), eviction, LM(), validation_eviction=validation), tiny_data())
    assert trainer.global_step == 0


def test_an_objective_that_asks_for_more_than_the_shortest_context_has(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(KnormPress()), Mixed([LM(), Reconstruction()]))
    trainer = tiny_trainer(Curriculum(Fixed(0.5)), max_steps=1)
    with pytest.raises(ValueError, match=r"32 tokens after a cue of 8, and a context of 39 is shorter: .*shortest_con"):
        trainer.fit(module, tiny_data(shortest_context=39, retrieval_share=0.0))
    assert module.global_step == 0
    trainer.fit(module, tiny_data(shortest_context=40, retrieval_share=0.0))
    assert module.global_step == 1
