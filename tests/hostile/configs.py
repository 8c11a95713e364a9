"""Configurations that are wrong, or written to do damage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.hostile.situation import Situation, hostile, save_family


def refused_text(folder: Path, text: str | bytes, *words: str) -> Situation:
    """Write `text` as the configuration; `BASE` and `E0`, `E1` in it are the checkpoints."""
    family = save_family(folder)
    data = text.encode() if isinstance(text, str) else text
    for name, path in (("BASE", family.base), ("E0", family.experts[0]), ("E1", family.experts[1])):
        data = data.replace(name.encode(), str(path).encode())
    family.config.write_bytes(data)
    return family.refused("config.yaml", *words)


def refused_keys(
    folder: Path,
    *words: str,
    method: str = "della",
    base: str = "base_model: BASE",
    models: Sequence[str] = ("{model: E0}", "{model: E1}"),
    parameters: str = "{density: 0.5}",
    more: str = "",
) -> Situation:
    """Write a configuration with one thing wrong."""
    listed = "".join(f"  - {m}\n" for m in models)
    text = f"merge_method: {method}\n{base}\nmodels:\n{listed}parameters: {parameters}\n{more}"
    return refused_text(folder, text, *words)


@hostile
def case_config_missing(folder: Path) -> Situation:
    family = save_family(folder)
    family.config.unlink()
    return family.refused(str(family.config), "no such configuration file")


@hostile
def case_config_is_a_directory(folder: Path) -> Situation:
    family = save_family(folder)
    family.config.unlink()
    family.config.mkdir()
    return family.refused(str(family.config), "is a directory")


@hostile
def case_config_empty(folder: Path) -> Situation:
    return refused_text(folder, "", "empty", "merge_method")


@hostile
def case_config_binary(folder: Path) -> Situation:
    return refused_text(folder, b"\x80\x81\xff\x00" * 100, "UTF-8")


@hostile
def case_config_with_control_characters(folder: Path) -> Situation:
    return refused_text(folder, "merge_method: \x07\x1b[2J\n", "not valid YAML")


@hostile
def case_config_of_a_gigabyte(folder: Path) -> Situation:
    situation = refused_text(folder, "", "1 MiB")
    with situation.config.open("r+b") as file:
        file.truncate(1 << 30)
    return situation


@hostile
def case_config_is_a_list(folder: Path) -> Situation:
    return refused_text(folder, "- merge_method\n", "mapping")


@hostile
def case_config_is_no_yaml(folder: Path) -> Situation:
    return refused_text(folder, "merge_method: [della\nmodels: }\n", "line 2", "not valid YAML")


@hostile
def case_billion_laughs(folder: Path) -> Situation:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return refused_text(folder, "\n".join(lines), "line 6", "aliases")


@hostile
def case_yaml_merge_key_bomb(folder: Path) -> Situation:
    lines = [f"a0: &a0 {{{', '.join(f'x{i}: 1' for i in range(1000))}}}"]
    lines += [
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], y: *a{i - 1}}}" for i in range(1, 9)
    ]
    return refused_text(folder, "\n".join(lines), "line 8", "aliases")


@hostile
def case_yaml_nested_without_end(folder: Path) -> Situation:
    return refused_text(folder, "models: " + "[" * 100_000, "nested")


@hostile
def case_yaml_tag_that_runs_code(folder: Path) -> Situation:
    text = f"merge_method: !!python/object/apply:os.system ['touch {folder}/owned']\n"
    return refused_text(folder, text, "line 1", "tag", "not allowed")


@hostile
def case_yaml_tag_that_makes_an_object(folder: Path) -> Situation:
    return refused_text(folder, "models: !!python/object:os.stat_result []\n", "line 1", "tag")


@hostile
def case_two_yaml_documents(folder: Path) -> Situation:
    return refused_text(folder, "merge_method: della\n---\nmodels: []\n", "document 2", "name")


@hostile
def case_duplicate_yaml_key(folder: Path) -> Situation:
    return refused_keys(folder, "'parameters'", "twice", more="parameters: {density: 0.7}\n")


@hostile
def case_unknown_key(folder: Path) -> Situation:
    return refused_keys(
        folder, "granulrity", "did you mean `granularity`", more="granulrity: row\n"
    )


@hostile
def case_unknown_key_of_a_model(folder: Path) -> Situation:
    models = ("{model: E0}", "{model: E1, wieght: 1}")
    return refused_keys(folder, "models[1].wieght", "no known key", models=models)


@hostile
def case_unknown_parameter(folder: Path) -> Situation:
    return refused_keys(folder, "densty", "did you mean `density`", parameters="{densty: 0.5}")


@hostile
def case_slices(folder: Path) -> Situation:
    return refused_text(folder, "merge_method: della\nslices: []\n", "`slices` lists none")


@hostile
def case_unknown_method(folder: Path) -> Situation:
    return refused_keys(folder, "merge_method", "dela", "did you mean `della`", method="dela")


@hostile
def case_method_missing(folder: Path) -> Situation:
    return refused_text(
        folder, "base_model: BASE\nmodels: [{model: E0}]\n", "merge_method", "missing"
    )


@hostile
def case_base_missing(folder: Path) -> Situation:
    return refused_keys(folder, "base_model", "missing", "deltas", base="")


@hostile
def case_models_missing(folder: Path) -> Situation:
    return refused_text(folder, "merge_method: della\nbase_model: BASE\n", "models", "missing")


@hostile
def case_no_models(folder: Path) -> Situation:
    text = "merge_method: della\nbase_model: BASE\nmodels: []\n"
    return refused_text(folder, text, "models", "no expert")


@hostile
def case_only_the_base_as_a_model(folder: Path) -> Situation:
    return refused_keys(folder, "models", "no expert", models=("{model: BASE}",))


@hostile
def case_model_is_a_number(folder: Path) -> Situation:
    return refused_keys(folder, "models[0].model", "path", "7", models=("{model: 7}",))


@hostile
def case_model_without_a_name(folder: Path) -> Situation:
    return refused_keys(folder, "models[0].model", "path", models=("{model: ' '}",))


@hostile
def case_url_with_credentials(folder: Path) -> Situation:
    models = ("{model: 's3://AKIA:secret@bucket/model'}",)
    return refused_keys(folder, "models[0].model", "s3:// URL", "environment", models=models)


@hostile
def case_url_with_one_slash(folder: Path) -> Situation:
    models = ("{model: 's3:/bucket/model'}",)
    return refused_keys(folder, "models[0].model", "misspelled", "s3://bucket/model", models=models)


@hostile
def case_file_url_with_a_host(folder: Path) -> Situation:
    models = ("{model: 'file://localhost/models/e0'}",)
    return refused_keys(folder, "models[0].model", "file:///models/e0", models=models)


@hostile
def case_output_url_with_one_slash(folder: Path) -> Situation:
    return save_family(folder).refused("output", "s3://bucket/out", out=Path("s3:/bucket/out"))


@hostile
def case_output_url_with_a_semicolon(folder: Path) -> Situation:
    return save_family(folder).refused("output", "gs://***@bucket", out=Path("gs;/KEY:SEC@bucket"))


@hostile
def case_number_in_octal(folder: Path) -> Situation:
    models = ("{model: E0, parameters: {weight: 010}}", "{model: E1}")
    return refused_keys(folder, "line 4", "'010' is 8", "decimal", models=models)


@hostile
def case_number_in_base_60(folder: Path) -> Situation:
    return refused_keys(folder, "'1:30' is 90", "decimal", parameters="{density: 1:30}")


@hostile
def case_url_with_a_query(folder: Path) -> Situation:
    models = ("{model: 's3://bucket/model?X-Amz-Signature=secret'}",)
    return refused_keys(folder, "models[0].model", "s3:// URL", "environment", models=models)


@hostile
def case_density_and_drop_rate(folder: Path) -> Situation:
    parameters = "{density: 0.5, drop_rate: 0.5}"
    return refused_keys(folder, "density", "drop_rate", "keep one", parameters=parameters)


@hostile
def case_epsilon_and_window_size(folder: Path) -> Situation:
    parameters = "{density: 0.5, epsilon: 0.1, window_size: 0.2}"
    return refused_keys(folder, "epsilon", "window_size", "keep one", parameters=parameters)


@hostile
def case_rescale_twice(folder: Path) -> Situation:
    parameters = "{density: 0.5, rescale: l1}"
    return refused_keys(
        folder, "rescale", "keep one", parameters=parameters, more="rescale: none\n"
    )


@hostile
def case_window_below_zero(folder: Path) -> Situation:
    parameters = "{density: 0.1, epsilon: 0.2}"
    return refused_keys(folder, "density 0.1", "epsilon 0.2", "below 0.1", parameters=parameters)


@hostile
def case_window_above_one(folder: Path) -> Situation:
    parameters = "{density: 0.9, window_size: 0.4}"
    return refused_keys(folder, "density 0.9", "0.4", "at most 0.1", parameters=parameters)


@hostile
def case_window_out_of_bounds_in_the_middle_of_a_gradient(folder: Path) -> Situation:
    parameters = "{density: [0.5, 0.95, 0.5], epsilon: 0.1}"
    return refused_keys(folder, "density 0.95", "at most 0.05", parameters=parameters)


@hostile
def case_window_out_of_bounds_for_one_tensor(folder: Path) -> Situation:
    parameters = "{density: [{filter: mlp, value: 0.95}, {value: 0.5}], epsilon: 0.1}"
    return refused_keys(folder, "mlp", "density 0.95", parameters=parameters)


@hostile
def case_density_in_percent(folder: Path) -> Situation:
    return refused_keys(
        folder, "parameters.density", "from 0 to 1", "50", parameters="{density: 50}"
    )


@hostile
def case_density_is_a_word(folder: Path) -> Situation:
    return refused_keys(
        folder, "parameters.density", "number", "half", parameters="{density: half}"
    )


@hostile
def case_weight_nan(folder: Path) -> Situation:
    models = ("{model: E0, parameters: {weight: .nan}}", "{model: E1}")
    return refused_keys(folder, "models[0].parameters.weight", "finite", "nan", models=models)


@hostile
def case_weight_infinite(folder: Path) -> Situation:
    models = ("{model: E0}", "{model: E1, parameters: {weight: -.inf}}")
    return refused_keys(folder, "models[1].parameters.weight", "finite", "inf", models=models)


@hostile
def case_weight_with_a_million_digits(folder: Path) -> Situation:
    models = ("{model: E0, parameters: {weight: " + "9" * 1_000_000 + "}}",)
    return refused_keys(folder, "number", models=models)


@hostile
def case_weights_that_sum_to_zero(folder: Path) -> Situation:
    models = [f"{{model: E{m}, parameters: {{weight: {w}}}}}" for m, w in ((0, 1), (1, -1))]
    return refused_keys(
        folder, "weights (1, -1)", "zero", "normalize", models=models, method="linear", base=""
    )


@hostile
def case_unknown_dtype_of_the_output(folder: Path) -> Situation:
    return refused_keys(folder, "out_dtype", "bfloat17", "bfloat16", more="out_dtype: bfloat17\n")


@hostile
def case_dtype_that_cannot_be_written(folder: Path) -> Situation:
    return refused_keys(folder, "dtype", "int8", "can be written", more="dtype: int8\n")


@hostile
def case_seed_out_of_range(folder: Path) -> Situation:
    return refused_keys(folder, "seed", "2**64", more=f"seed: {1 << 64}\n")


@hostile
def case_tokenizer_of_nobody(folder: Path) -> Situation:
    more = "tokenizer_source: org/model\n"
    return refused_keys(folder, "tokenizer_source", "org/model", "one of the models", more=more)


@hostile
def case_tokens_of_a_tokenizer(folder: Path) -> Situation:
    more = "tokenizer: {source: union, tokens: {a: {source: nobody}}}\n"
    return refused_keys(folder, "tokenizer.tokens.a", "one of the models", more=more)


@hostile
def case_adapter_of_no_rank(folder: Path) -> Situation:
    more = "output: {adapter: none}\n"
    return refused_keys(folder, "output.adapter", "'none'", "from 1 to", more=more)


@hostile
def case_chat_template_of_nobody(folder: Path) -> Situation:
    return refused_keys(folder, "chat_template", "chatlm", "chatml", more="chat_template: chatlm\n")


@hostile
def case_slices_of_other_lengths(folder: Path) -> Situation:
    sources = "{model: E0, layer_range: [0, 1]}, {model: E1, layer_range: [0, 2]}"
    text = f"merge_method: linear\nslices: [{{sources: [{sources}]}}]\n"
    return refused_text(folder, text, "slices[0].sources[1].layer_range", "has 2 layers")


@hostile
def case_slices_and_models(folder: Path) -> Situation:
    more = "slices: [{sources: [{model: E0, layer_range: [0, 1]}]}]\n"
    return refused_keys(folder, "slices", "models", more=more)
