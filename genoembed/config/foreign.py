"""What other toolkits call an option, and what it is called here.

One table for the command line, configuration files and Python. Of several names, separated by blanks, the
first that a command has counts; what stands behind ``=`` is the value that means the same.
"""

from __future__ import annotations

from typing import NamedTuple

TRANSFORMERS = {
    # TrainingArguments
    "num_train_epochs": "max_epochs",
    "per_device_train_batch_size": "rows_per_device",
    "per_device_eval_batch_size": "rows_per_device",
    "per_gpu_train_batch_size": "rows_per_device",
    "auto_find_batch_size": "rows_per_device",
    "gradient_accumulation_steps": "accumulation_steps",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "min_learning_rate",
    "warmup_ratio": "warmup_fraction warmup_steps",
    "label_smoothing_factor": "label_smoothing",
    "metric_for_best_model": "metric",
    "greater_is_better": "metric",
    "load_best_model_at_end": "metric",
    "early_stopping_patience": "patience",
    "do_eval": "validation heldout",
    "do_predict": "test",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "save_strategy": "save_steps eval_steps",
    "save_steps": "eval_steps",
    "logging_strategy": "logging_steps",
    "fsdp": "distributed=fsdp",
    "fsdp_config": "distributed=fsdp",
    "deepspeed": "distributed=fsdp",
    "bf16": "dtype=bfloat16",
    "fp16": "dtype=float16",
    "use_fp16": "dtype=float16",
    "bf16_full_eval": "dtype=bfloat16",
    "fp16_full_eval": "dtype=float16",
    "tf32": "dtype",
    "torch_dtype": "dtype",
    "data_seed": "seed",
    "group_by_length": "mixed_lengths",
    "train_sampling_strategy": "mixed_lengths",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "optimizer": "optim",
    "adafactor": "optim=adafactor",
    "torch_compile": "compile_blocks",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
    "output_dir": "output",
    "run_name": "output",
    # Auto classes, pipelines and example scripts
    "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "model_name": "model",
    "model_id": "model",
    "config_name": "like",
    "train_file": "train corpus",
    "validation_file": "validation heldout",
    "test_file": "test",
    "max_seq_length": "window max_crop_bp",
    "max_length": "window max_crop_bp",
    "block_size": "window",
    "device_map": "device",
    # generate
    "max_new_tokens": "length",
    "num_return_sequences": "num_samples",
    "do_sample": "temperature",
    "use_cache": "cache",
}

PEFT = {
    "use_lora": "tuning=lora",
    "peft_config": "tuning=lora",
    "r": "lora_rank",
    "lora_r": "lora_rank",
    "target_modules": "lora_targets",
    "lora_target_modules": "lora_targets",
    "freeze_encoder": "tuning=frozen",
}

SENTENCE_TRANSFORMERS = {
    "epochs": "max_epochs",
    "train_batch_size": "rows_per_device",
    "batch_size": "batch_tokens rows_per_device batch_rows",
    "mini_batch_size": "micro_batch",
    "scale": "temperature",
    "pooling_mode": "pooling",
    "pooler_type": "pooling",
    "pool_type": "pooling",
    "truncate_dim": "vector_width",
    "triplet_margin": "margin",
    "distance_metric": "distance metric",
}

FLAG_EMBEDDING = {
    "normlized": "normalize",
    "normalize_embeddings": "normalize",
    "normalized": "normalize",
    "train_data": "train",
    "query_max_len": "max_crop_bp",
    "passage_max_len": "max_crop_bp",
    "negatives_cross_device": "across_devices",
    "negatives_x_device": "across_devices",
    "sentence_pooling_method": "pooling",
    "pooling_method": "pooling",
    "sub_batch_size": "micro_batch",
    "sub_batch": "micro_batch",
    "gc_chunk_size": "micro_batch",
    "chunk_size": "micro_batch",
    "use_inbatch_neg": "in_batch_negatives",
    "no_in_batch_neg_flag": "in_batch_negatives",
    "fix_encoder": "mode=fix_encoder",
    "unified_finetuning": "mode=all",
    "colbert_dim": "vector_width",
    "use_self_distill": "self_distillation_start",
    "self_distill_start_step": "self_distillation_start",
    "knowledge_distillation": "distillation",
    "kd_loss_type": "distillation",
    "num_negatives": "train_group_size",
    "hybrid": "mode",
}

BCEMBEDDING = {
    "normalize_to_unit": "normalize",
    "pooler": "pooling",
    "model_path": "model",
}

SIMLM_AND_E5 = {
    "l2_normalize": "normalize",
    "train_n_passages": "train_group_size",
    "t": "temperature",
    "q_max_len": "max_crop_bp",
    "p_max_len": "max_crop_bp",
    "out_dimension": "vector_width",
    "full_contrastive_loss": "scope=full",
    "do_kd_biencoder": "distillation",
}

OTHERS = {
    # PyTorch, Lightning and Evo
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "eta_min": "min_learning_rate",
    "min_lr": "min_learning_rate",
    "lr_factor": "plateau_factor",
    "lr_patience": "plateau_patience",
    "warmup": "warmup_steps",
    "clip_grad_norm": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "grad_accum_steps": "accumulation_steps",
    "accumulate_grad_batches": "accumulation_steps",
    "precision": "dtype",
    "random_state": "seed",
    "random_seed": "seed",
    "n_tokens": "length",
    "n_samples": "num_samples",
    "cached_generation": "cache",
    "prepend_bos": "start_token",
    "stop_at_eos": "stop_at_end",
}

FORMER = {
    "layer": "layers",
    "pool": "pooling",
    "fuse": "fusion",
    "kin_identity": "homolog_identity",
    "own_negatives_only": "in_batch_negatives=False",
    "one_strand": "both_strands=False",
    "neighbors": "k",
    "neighbours": "neighbors k",
    "colour": "color",
    "top_k": "k top",
}
"""Words of this project's own that have become others."""

TABLES = {
    "transformers": TRANSFORMERS,
    "peft": PEFT,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "FlagEmbedding": FLAG_EMBEDDING,
    "BCEmbedding": BCEMBEDDING,
    "SimLM and E5": SIMLM_AND_E5,
    "others": OTHERS,
    "genoembed": FORMER,
}
"""By whose words they are."""

NOT_OPTIONS = {
    "device": "training takes the GPU of its process: set CUDA_VISIBLE_DEVICES, empty for the CPU",
    "local_rank": "start it with torchrun or accelerate launch",
    "ddp_backend": "start it with torchrun or accelerate launch",
    "num_gpus": "start it with torchrun or accelerate launch",
    "dataloader_num_workers": "rows are prepared in the process that trains",
    "dataloader_drop_last": "a last, short batch takes part",
    "save_total_limit": "the newest and the best checkpoint are kept",
    "remove_unused_columns": "columns are named, and others are not read",
    "push_to_hub": "the folder 'final' can be uploaded as it is",
    "do_train": "training is what the command does",
    "adam_beta1": "the optimizer's moments are fixed",
    "adam_beta2": "the optimizer's moments are fixed",
    "adam_epsilon": "the optimizer's moments are fixed",
    "same_dataset_within_batch": "batches hold rows of all files alike",
    "query_instruction_for_retrieval": "DNA has no instructions",
    "passage_instruction_for_retrieval": "DNA has no instructions",
    "share_encoder": "queries and passages always share the encoder",
}
"""What training has no option for, and what it does instead."""


class Answer(NamedTuple):
    """What a word of another toolkit is here."""

    key: str
    value: str
    """The value that means the same, where it goes with one; else empty."""
    source: str


def _joined() -> dict[str, tuple[Answer, ...]]:
    return {
        word: tuple(
            Answer(key, value, source) for key, _, value in (name.partition("=") for name in names.split())
        )
        for source, table in TABLES.items()
        for word, names in table.items()
    }


FOREIGN = _joined()


def known_elsewhere(word: str, known: tuple[str, ...]) -> Answer | None:
    """Return the option that a word of another toolkit stands for, of those that a command has.

    Example:
        >>> known_elsewhere("fp16", ("dtype", "window"))
        Answer(key='dtype', value='float16', source='transformers')
    """
    return next((answer for answer in FOREIGN.get(word, ()) if answer.key in known), None)
