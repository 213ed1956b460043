//! `ferry import`: what other servers' files come to, and that our own parsers take it.

use std::path::Path;

use ferry::config::{Config, Machine};
use ferry::import::{Fault, Format, ImportError, Imported, Note, Options, Verdict, read};
use ferry::models::manifest::{Manifest, Pooling, Precision};
use proptest::prelude::*;

fn imported(format: Format, text: &str) -> Imported {
    assert_eq!(Format::guess(text), Some(format), "{text}");
    read(format, text, &Options::default()).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn refused(format: Format, text: &str) -> String {
    read(format, text, &Options::default()).expect_err(text).to_string()
}

/// What of `more` is said replaces what `base` says, table by table and key by key.
fn overlay(base: &str, more: &str) -> String {
    let parse = |text: &str| text.parse::<toml::Table>().unwrap_or_else(|error| panic!("{error}\n{text}"));
    fn merge(into: &mut toml::Table, from: toml::Table) {
        for (key, value) in from {
            match (into.get_mut(&key), value) {
                (Some(toml::Value::Table(inside)), toml::Value::Table(more)) => merge(inside, more),
                (_, value) => drop(into.insert(key, value)),
            }
        }
    }
    let mut table = parse(base);
    merge(&mut table, parse(more));
    table.to_string()
}

/// A manifest without a word about batching.
const ECHO: &str = "architecture = \"echo\"\nversion = \"1\"\n";
const DIGITS: &str = "architecture = \"digits\"\nversion = \"1\"\n\
    [[input]]\nname = \"image\"\ndtype = \"f32\"\nshape = [8, 8]\n\
    [[output]]\nname = \"logits\"\ndtype = \"f32\"\nshape = [10]\n";
/// An encoder of up to 512 tokens.
const ENCODER: &str = "architecture = \"bert\"\nversion = \"1\"\n\
    [dims.tokens]\nmin = 1\nmax = 512\n\
    [[input]]\nname = \"ids\"\ndtype = \"u32\"\nshape = [\"tokens\"]\n\
    [[output]]\nname = \"embedding\"\ndtype = \"f32\"\nshape = [384]\n\
    [model]\nlayers = 6\nhidden = 384\nheads = 12\nintermediate = 1536\nvocab = 30522\npositions = 512\n\
    layer_norm_eps = 1e-12\nactivation = \"gelu_erf\"\npooling = \"max\"\nnormalize = true\n";

/// Takes both parts as a server would, and gives the manifest.
fn accepted(base: &str, imported: &Imported) -> Manifest {
    let text = overlay(base, &imported.manifest.to_toml());
    let manifest = Manifest::parse("m", Path::new("model.toml"), &text);
    let manifest = manifest.unwrap_or_else(|error| panic!("{error}\n{text}"));
    config_of(imported);
    manifest
}

fn config_of(imported: &Imported) -> Config {
    let text = imported.server.to_toml();
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), &text).expect("writable");
    let machine = Machine { cores: 4, nofile: 4096, memory: u64::MAX };
    Config::load_on(machine, Some(file.path()), &[]).unwrap_or_else(|errors| panic!("{errors}\n{text}"))
}

fn note<'a>(imported: &'a Imported, setting: &str) -> &'a Note {
    let found = imported.notes.iter().find(|note| note.setting == setting);
    found.unwrap_or_else(|| panic!("no note about {setting}: {:#?}", imported.notes))
}

const TRITON: &str = r#"
name: "Text-Encoder"   # an encoder
platform: "onnxruntime_onnx"
max_batch_size: 64
input [
  { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true },
  { name: "mask" data_type: TYPE_INT64 dims: [ -1 ] }
]
output { name: "embedding" data_type: TYPE_FP32 dims: [ 384 ] }
dynamic_batching {
  preferred_batch_size: [ 16, 32 ]
  max_queue_delay_microseconds: 2500
  preserve_ordering: true
  priority_levels: 2
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 50000
    max_queue_size: 8
  }
  priority_queue_policy { key: 1 value { max_queue_size: 5 } }
}
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] rate_limiter { priority: 2 } } ]
optimization { cuda { graphs: true } }
model_warmup { name: "w" batch_size: 8 inputs { key: "ids" value { data_type: TYPE_INT64 dims: 8 zero_data: true } } }
response_cache { enable: true }
somthing_new: 4
"#;

#[test]
fn a_triton_model_becomes_a_manifest_that_is_taken() {
    let imported = imported(Format::Triton, TRITON);
    assert_eq!(imported.model.as_deref(), Some("text-encoder"));
    let manifest = accepted(ECHO, &imported);
    let batching = &manifest.batching;
    assert_eq!(batching.rows_max, 64);
    assert_eq!(batching.queue_delay_max.expect("given").as_micros(), 2500);
    assert_eq!(batching.slo.as_millis(), 50);
    assert_eq!(batching.weight, 0.5);
    assert_eq!(manifest.queue.rows_max, Some(64), "the queue holds a batch");
    assert_eq!(manifest.contract.len_max(), 512);
    assert_eq!(manifest.contract.inputs.len(), 2);
    let rows: std::collections::BTreeSet<u32> = manifest.warmup.shapes.iter().map(|(rows, _)| *rows).collect();
    assert_eq!(rows.into_iter().collect::<Vec<_>>(), [8, 16, 32]);
    let config = config_of(&imported);
    assert_eq!(config.threads.executors, 4, "two for each of two GPUs");
    assert_eq!(config.executor.device.to_string(), "cuda:0,1");
}

#[test]
fn every_setting_of_a_triton_model_is_accounted_for() {
    let imported = imported(Format::Triton, TRITON);
    for (setting, verdict) in [
        ("name", Verdict::Changed),
        ("platform", Verdict::Absent),
        ("max_batch_size", Verdict::Taken),
        ("dynamic_batching.preferred_batch_size", Verdict::Changed),
        ("dynamic_batching.max_queue_delay_microseconds", Verdict::Taken),
        ("dynamic_batching.preserve_ordering", Verdict::Absent),
        ("dynamic_batching.priority_levels", Verdict::Changed),
        ("dynamic_batching.default_queue_policy.default_timeout_microseconds", Verdict::Changed),
        ("dynamic_batching.default_queue_policy.max_queue_size", Verdict::Changed),
        ("dynamic_batching.priority_queue_policy", Verdict::Absent),
        ("instance_group", Verdict::Changed),
        ("instance_group.rate_limiter.priority", Verdict::Changed),
        ("optimization.cuda.graphs", Verdict::Taken),
        ("model_warmup", Verdict::Changed),
        ("response_cache", Verdict::Absent),
        ("somthing_new", Verdict::Absent),
        ("input.dims", Verdict::Assumed),
    ] {
        let note = note(&imported, setting);
        assert_eq!(note.verdict, verdict, "{note:?}");
        assert!(note.why.len() > 5, "{note:?}");
    }
    let at = note(&imported, "dynamic_batching.max_queue_delay_microseconds").at.expect("a place");
    assert_eq!((at.line, at.column), (12, 3));
}

#[test]
fn what_triton_does_and_ferry_does_not_is_said() {
    let of = |text: &str| imported(Format::Triton, text);
    let sequence = of("max_batch_size: 4 sequence_batching { direct { } }");
    assert!(note(&sequence, "sequence_batching").why.contains("no state between requests"));
    assert!(sequence.notes.iter().all(|note| note.setting != "dynamic_batching"), "it is not missing there");
    let ensemble = of("ensemble_scheduling { step { model_name: 'a' } }");
    assert_eq!(note(&ensemble, "ensemble_scheduling").verdict, Verdict::Absent);
    let alone = of("max_batch_size: 4");
    assert_eq!(note(&alone, "dynamic_batching").verdict, Verdict::Changed);
    let single = of("max_batch_size: 0 dynamic_batching { }");
    assert_eq!(accepted(DIGITS, &single).batching.rows_max, 1);
    // Contracts that ours cannot say are not written by half.
    for (inputs, why) in [
        ("input { name: 'a' data_type: TYPE_FP32 dims: [ 3, -1 ] }", "only the first dimension may vary"),
        ("input { name: 'a' data_type: TYPE_STRING dims: [ 1 ] }", "TYPE_STRING"),
        ("input { name: 'a' data_type: TYPE_FP32 dims: [ 3 ] }", "no input's varies"),
    ] {
        let text = format!("max_batch_size: 8 {inputs} output {{ name: 'b' data_type: TYPE_FP32 dims: [ -1 ] }}");
        let imported = of(&text);
        let note = note(&imported, "input, output");
        assert!(note.verdict == Verdict::Absent && note.why.contains(why), "{note:?}");
        accepted(DIGITS, &imported);
    }
}

#[test]
fn an_image_model_of_triton_keeps_its_shapes_and_bounds_its_requests() {
    let text = "max_batch_size: 1024 dynamic_batching { }\n\
                input { name: \"x\" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] }\n\
                output { name: \"y\" data_type: TYPE_FP32 dims: [ 1000, 1, 1 ] reshape { shape: [ 1000 ] } }";
    let imported = imported(Format::Triton, text);
    let manifest = accepted(ECHO, &imported);
    assert_eq!(manifest.contract.outputs[0].shape.len(), 1, "as the model has it");
    assert_eq!(manifest.contract.rows_max, (256 << 20) / (3 * 224 * 224 * 4));
    assert_eq!(note(&imported, "input.format").verdict, Verdict::Absent);
}

#[test]
fn a_wrong_field_is_an_error_at_its_place() {
    for (text, expected) in [
        ("max_batch_size: 'x'", "1:1: max_batch_size: expected a whole number from 0 to 65536, got \"x\""),
        ("max_batch_size: 1\nmax_batch_size: 2", "2:1: max_batch_size is there twice, first at 1:1"),
        (
            "dynamic_batching {\n  max_queue_delay_microseconds: -1 }",
            "2:3: dynamic_batching.max_queue_delay_microseconds: expected a whole number from 0 to 9223372036854775807, got -1",
        ),
        (
            "input { name: 'a' data_type: TYPE_FLOAT dims: 1 }",
            "1:19: input.data_type: expected a type such as TYPE_FP32, got \"TYPE_FLOAT\"",
        ),
        ("max_batch_size: 1 {", "1:19: expected a field name, got '{'"),
    ] {
        assert_eq!(refused(Format::Triton, text), expected);
    }
}

#[test]
fn tensorflow_serving_parameters_become_blocks_that_are_taken() {
    let text = "max_batch_size { value: 128 }\nbatch_timeout_micros { value: 1500 }\nmax_enqueued_batches { value: 20 }\n\
                num_batch_threads { value: 6 }\nthread_pool_name { value: 'pool' }\nallowed_batch_sizes: [ 32, 64 ]\n\
                allowed_batch_sizes: 128\npad_variable_length_inputs: true\n";
    let imported = imported(Format::TensorflowServing, text);
    for base in [DIGITS, ENCODER] {
        let manifest = accepted(base, &imported);
        assert_eq!(manifest.batching.rows_max, 128);
        assert_eq!(manifest.batching.queue_delay_max.expect("given").as_micros(), 1500);
        assert_eq!(manifest.queue.rows_max, Some(2560));
        assert!(manifest.warmup.shapes.iter().any(|(rows, _)| *rows == 64));
    }
    assert_eq!(config_of(&imported).threads.executors, 6);
    assert_eq!(note(&imported, "max_batch_size").verdict, Verdict::Taken);
    assert_eq!(note(&imported, "batch_timeout_micros").verdict, Verdict::Taken);
    for setting in ["max_enqueued_batches", "num_batch_threads", "allowed_batch_sizes", "pad_variable_length_inputs"] {
        assert_eq!(note(&imported, setting).verdict, Verdict::Changed, "{setting}");
    }
    assert_eq!(note(&imported, "thread_pool_name").verdict, Verdict::Absent);
}

#[test]
fn what_a_tensorflow_serving_file_leaves_out_is_its_default_there() {
    let imported = imported(Format::TensorflowServing, "num_batch_threads { value: 2 }");
    let manifest = accepted(DIGITS, &imported);
    assert_eq!((manifest.batching.rows_max, manifest.queue.rows_max), (1000, Some(10_000)));
    assert_eq!(manifest.batching.queue_delay_max.expect("given").as_micros(), 0);
    for setting in ["max_batch_size", "batch_timeout_micros", "max_enqueued_batches"] {
        assert_eq!(note(&imported, setting).verdict, Verdict::Assumed, "{setting}");
    }
}

#[test]
fn tensorflow_serving_parameters_that_are_wrong_there_are_wrong_here() {
    let of = |text: &str| refused(Format::TensorflowServing, text);
    assert!(of("max_batch_size: 128").contains("expected a message in braces, got 128"));
    assert!(of("max_batch_size { value: 0 }").contains("whole number from 1"));
    assert!(of("max_batch_size { }").contains("{ value: 1 } or more"));
    assert!(of("max_batch_size { value: 8 } allowed_batch_sizes: [ 4, 2 ]").contains("expected increasing sizes"));
    assert!(
        of("max_batch_size { value: 8 } allowed_batch_sizes: [ 2, 4 ]")
            .contains("expected the last to be max_batch_size 8")
    );
}

#[test]
fn a_command_line_of_text_embeddings_inference_is_taken() {
    let text = "docker run --gpus all -p 8080:80 -v $PWD/data:/data ghcr.io/huggingface/text-embeddings-inference:1.8 \\\n  \
                --model-id BAAI/bge-base-en-v1.5 --max-batch-tokens=8192 --max-batch-requests 64 --auto-truncate \\\n  \
                --dtype float16 --pooling cls --tokenization-workers 4 -p 3000 --hf-token 'hf_secret' --served-model-name 'My Bge'";
    let imported = imported(Format::TextEmbeddings, text);
    assert_eq!(imported.model.as_deref(), Some("my_bge"));
    let manifest = accepted(ENCODER, &imported);
    assert_eq!((manifest.batching.rows_max, manifest.batching.padded_cells_max), (64, 8192));
    assert_eq!(manifest.contract.rows_max, 32, "--max-client-batch-size is 32 where it is not given");
    assert_eq!(manifest.queue.rows_max, Some(512));
    assert!(manifest.text.expect("given").truncate);
    let model = manifest.bert.expect("given");
    assert_eq!((model.precision, model.pooling), (Precision::F16, Pooling::Cls));
    let config = config_of(&imported);
    assert_eq!((config.listen.port(), config.threads.tokenizers), (3000, 4));
    assert_eq!(note(&imported, "--model-id").verdict, Verdict::Absent);
    assert_eq!(note(&imported, "--max-batch-tokens").verdict, Verdict::Changed);
    assert_eq!(note(&imported, "--max-client-batch-size").verdict, Verdict::Assumed);
    assert_eq!(note(&imported, "--hf-token").value, "…", "a secret is not printed");
}

#[test]
fn variables_of_text_embeddings_inference_are_taken_with_their_lines() {
    let text = "# tuned\nexport MAX_BATCH_TOKENS=100000\nMAX_CONCURRENT_REQUESTS=\"2048\"\nAUTO_TRUNCATE=false\nPOOLING=splade\nJSON_OUTPUT=true\n";
    let imported = imported(Format::TextEmbeddings, text);
    let manifest = accepted(ENCODER, &imported);
    assert_eq!((manifest.batching.rows_max, manifest.batching.padded_cells_max), (2048, 100_000));
    assert_eq!(manifest.batching.queue_delay_max.expect("given").as_micros(), 0, "nothing is held there");
    assert!(!manifest.text.expect("given").truncate);
    assert_eq!(manifest.bert.expect("given").pooling, Pooling::Max, "splade is not written");
    assert_eq!(note(&imported, "--max-concurrent-requests").at.expect("a line").line, 3);
    assert_eq!(note(&imported, "--pooling").verdict, Verdict::Absent);
}

#[test]
fn flags_that_are_wrong_say_what_was_expected() {
    let of = |text: &str| refused(Format::TextEmbeddings, text);
    assert!(of("--max-batch-tokens many").contains("expected a whole number from 1"));
    assert!(of("--max-batch-tokens").contains("expected a value behind it"));
    assert!(of("--dtype int8").contains("expected float32, float16 or bfloat16"));
    assert!(of("--pooling 'cls").contains("quotes are closed"));
    assert!(of("text-embeddings-router serve --port 1").contains("expected a flag"));
    assert!(of("PORT=80\nPORT=81").starts_with("2:1: --port is there twice"));
}

#[test]
fn ports_never_meet() {
    for flags in [
        "--port 7601",
        "--prometheus-port 7600",
        "--port 80 --prometheus-port 80",
        "--port 7601 --prometheus-port 7601",
    ] {
        let config = config_of(&imported(Format::TextEmbeddings, flags));
        assert_ne!(config.listen, config.control, "{flags}");
    }
}

#[test]
fn an_error_of_the_text_has_its_place_once() {
    let error = read(Format::Triton, "a: [1", &Options::default()).expect_err("not ended");
    assert!(matches!(&error, ImportError { at: Some(_), fault: Fault::Syntax(_) }));
    assert_eq!(error.to_string(), "1:6: expected ',' or ']', got the end");
}

proptest! {
    #[test]
    fn any_budgets_of_text_embeddings_inference_are_taken(
        tokens in 1u64..200_000, rows in prop::option::of(1u64..70_000), client in 1u64..65_000, waiting in 1u64..100_000,
        longest in 1u32..512,
    ) {
        let rows = rows.map_or(String::new(), |rows| format!("--max-batch-requests {}", rows.min(65_536)));
        let text = format!("--max-batch-tokens {tokens} {rows} --max-client-batch-size {client} --max-concurrent-requests {waiting}");
        let imported = read(Format::TextEmbeddings, &text, &Options { longest }).expect("right flags");
        let base = ENCODER.replace("max = 512", &format!("max = {longest}"));
        accepted(&base, &imported);
    }

    #[test]
    fn any_numbers_of_triton_are_taken(
        rows in 0u32..=65_536, delay in any::<u32>(), sizes in prop::collection::vec(1u32..=65_536, 0..5), queue in any::<u32>(),
        timeout in 0u64..=u64::MAX >> 1, first in prop_oneof![Just(-1i64), 1i64..5000], second in 1i64..5000,
    ) {
        let sizes = format!("{sizes:?}");
        let text = format!(
            "max_batch_size: {rows} dynamic_batching {{ max_queue_delay_microseconds: {delay} preferred_batch_size: {sizes} \
             default_queue_policy {{ max_queue_size: {queue} default_timeout_microseconds: {timeout} }} }} \
             input {{ name: 'a' data_type: TYPE_FP32 dims: [{first}, {second}] }} output {{ name: 'b' data_type: TYPE_INT8 dims: [{first}] }}"
        );
        let imported = read(Format::Triton, &text, &Options::default()).expect("right fields");
        accepted(ECHO, &imported);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[a-zA-Z0-9_:{}<>\\[\\]=,#\"' \n-]{0,120}") {
        for format in Format::ALL {
            // Neither panics nor loops.
            let _ = read(format, &text, &Options::default()).map_err(|error| error.to_string());
        }
    }
}

/// Runs `ferry` and returns its exit status, standard output and standard error.
fn ferry(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ferry")).args(arguments).output();
    let output = output.expect("the binary was built for this test");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("ferry prints UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_prints_toml_with_the_notes_as_comments() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("config.pbtxt");
    std::fs::write(&file, TRITON).expect("writable");
    let path = file.display().to_string();
    let (status, out, err) = ferry(&["import", &path, "--longest", "128"]);
    assert_eq!((status, err.as_str()), (Some(0), ""), "{out}");
    assert!(out.contains("queue_delay_max_us = 2500") && out.contains("max = 128"), "{out}");
    let plain = |line: &str| !line.starts_with('#') && !line.is_empty();
    assert!(out.lines().skip_while(|line| *line != "# Without an equivalent:").all(|line| !plain(line)), "{out}");
    let (status, out, _) = ferry(&["import", &path, "--json"]);
    assert_eq!(status, Some(0));
    let value: serde_json::Value = serde_json::from_str(&out).expect("one document");
    assert_eq!((value["format"].as_str(), value["model"].as_str()), (Some("triton"), Some("text-encoder")));
    assert!(value["notes"].as_array().expect("a list").iter().any(|note| note["verdict"] == "no equivalent"));
    let server: toml::Table = value["server"].as_str().expect("text").parse().expect("TOML");
    assert_eq!(server["threads"]["executors"].as_integer(), Some(4));
}

#[test]
fn the_command_fails_at_a_place_of_the_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("config.pbtxt");
    let path = file.display().to_string();
    let of = |text: &str, more: &[&str]| {
        std::fs::write(&file, text).expect("writable");
        ferry(&[&["import", &path], more].concat())
    };
    let (status, _, err) = of("max_batch_size: 1\nmax_batch_size: 2", &[]);
    assert_eq!(status, Some(1));
    assert!(err.contains("config.pbtxt:2:1: max_batch_size is there twice"), "{err}");
    let (status, _, err) = of("dynamic_batching {\n  a: }", &[]);
    assert_eq!(status, Some(1));
    assert!(err.contains("2:6: expected a value"), "{err}");
    assert_eq!(of("x: 1", &["--format", "toml"]).0, Some(2));
    assert_eq!(ferry(&["import", "/no/such/file"]).0, Some(1));
}
