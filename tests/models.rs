//! The models against their references: PyTorch's logits for `digits`, transformers' embeddings for the encoder.
//!
//! The references were made by tools/train_digits.py and tools/make_fixtures.py. `minilm` is compared where it has been
//! fetched; where not, its tests print a line and pass.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use candle_core::{DType as CandleDType, Device, Tensor};
use ferry::executor::batch::{AlignedBytes, BatchOutput, BatchView};
use ferry::executor::model::{Model, ModelError};
use ferry::models::manifest::Precision;
use ferry::models::repository::{self, LoadOptions, Loaded, ModelEntry};
use ferry::models::weights::WeightsFault;
use ferry::vocab::Layout;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn fixture(name: &str) -> HashMap<String, Tensor> {
    let file = root().join("tests/fixtures").join(name);
    candle_core::safetensors::load(&file, &Device::Cpu).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().expect("flattens").to_vec1().expect("is f32")
}

fn words(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().expect("flattens").to_vec1().expect("is u32")
}

fn load(directory: &Path, name: &str) -> ModelEntry {
    match repository::load(directory, name, &LoadOptions::default()) {
        Ok(Loaded::Model(entry)) => *entry,
        Ok(Loaded::Skipped(skipped)) => panic!("{}", skipped.reason),
        Err(error) => panic!("{error}"),
    }
}

/// `minilm` where it has been fetched.
fn minilm() -> Option<ModelEntry> {
    match repository::load(&root().join("models"), "minilm", &LoadOptions::default()).expect("loads or is skipped") {
        Loaded::Model(entry) => Some(*entry),
        Loaded::Skipped(skipped) => {
            println!("not compared: {}", skipped.reason);
            None
        }
    }
}

/// Runs one batch through a fresh instance. Padding is filled with `pad`, not with the contract's value, so that a test
/// can show that it does not matter.
fn run<T>(entry: &ModelEntry, rows: &[Vec<T>], padded_len: u32, pad: T) -> Result<BatchOutput, ModelError>
where
    T: bytemuck::AnyBitPattern + bytemuck::NoUninit,
{
    let contract = entry.model.contract();
    let spec = &contract.inputs[0];
    let mut input = AlignedBytes::default();
    input.set_len(rows.len() * spec.row_bytes(padded_len));
    let place = spec.row_elements(padded_len);
    for (row, place) in rows.iter().zip(input.as_mut_slice::<T>().chunks_exact_mut(place)) {
        place[..row.len()].copy_from_slice(row);
        place[row.len()..].fill(pad);
    }
    let lens: Vec<u32> = rows.iter().map(|row| if contract.length.is_some() { row.len() as u32 } else { 1 }).collect();
    let mut out = BatchOutput::default();
    out.prepare(contract, Layout::Padded, &lens, padded_len);
    // What a model forgets to write is found here as NaN.
    for output in &mut out.outputs {
        output.bytes_mut().fill(0xFF);
    }
    let inputs = [input];
    let batch = BatchView {
        contract,
        layout: Layout::Padded,
        rows: rows.len() as u32,
        padded_len,
        lens: &lens,
        inputs: &inputs,
    };
    entry.model.instantiate()?.run(batch, &mut out)?;
    Ok(out)
}

/// Answers of one batch in one layout, by an instance that is kept.
fn answers(entry: &ModelEntry, model: &mut dyn Model, rows: &[&(Vec<u32>, Vec<f32>)], layout: Layout) -> Vec<f32> {
    let contract = entry.model.contract();
    let lens: Vec<u32> = rows.iter().map(|(ids, _)| ids.len() as u32).collect();
    let padded_len = *lens.iter().max().expect("a batch has rows");
    let mut ids: Vec<u32> = Vec::new();
    for (row, _) in rows {
        ids.extend(row);
        if layout == Layout::Padded {
            ids.extend(std::iter::repeat_n(42, padded_len as usize - row.len()));
        }
    }
    let mut input = AlignedBytes::default();
    input.set_len(ids.len() * 4);
    input.as_mut_slice::<u32>().copy_from_slice(&ids);
    let mut out = BatchOutput::default();
    out.prepare(contract, layout, &lens, padded_len);
    out.outputs[0].bytes_mut().fill(0xFF);
    let inputs = [input];
    let batch = BatchView { contract, layout, rows: rows.len() as u32, padded_len, lens: &lens, inputs: &inputs };
    model.run(batch, &mut out).expect("runs");
    out.output_mut::<f32>(0).to_vec()
}

/// Goal: in whatever company, in either layout and on however many threads, a sentence has its reference's embedding.
/// Method: random batches, 30 or as many as AGREE_BATCHES says.
#[test]
fn minilm_in_random_company_equals_its_reference_in_both_layouts() {
    let batches: usize = std::env::var("AGREE_BATCHES").ok().map_or(30, |count| count.parse().expect("a number"));
    let rows: Vec<_> = minilm_rows().into_iter().map(|(_, ids, embedding)| (ids, embedding)).collect();
    let mut rng = StdRng::seed_from_u64(4);
    for threads in [1, 2] {
        let options = LoadOptions { threads, ..LoadOptions::default() };
        let loaded = repository::load(&root().join("models"), "minilm", &options).expect("loads or is skipped");
        let Loaded::Model(entry) = loaded else { return println!("not compared: minilm is not there") };
        let mut model = entry.model.instantiate().expect("makes an instance");
        for layout in [Layout::Packed, Layout::Padded] {
            let (mut worst, mut apart) = (1.0f64, 0.0f32);
            for _ in 0..batches {
                let batch: Vec<_> =
                    (0..rng.random_range(1..9)).map(|_| &rows[rng.random_range(0..rows.len())]).collect();
                let got = answers(&entry, &mut *model, &batch, layout);
                for ((_, want), got) in batch.iter().zip(got.chunks_exact(384)) {
                    worst = worst.min(cosine(want, got));
                    apart = want.iter().zip(got).map(|(want, got)| (want - got).abs()).fold(apart, f32::max);
                }
            }
            println!("{} on {threads} thread(s): worst cosine {worst:.8}, at most {apart:.1e} apart", layout.name());
            assert!(worst >= 0.9999, "{layout:?}: {worst}");
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Worst cosine of the rows of a batch with their references.
fn worst_cosine(entry: &ModelEntry, rows: &[(Vec<u32>, Vec<f32>)], padded_len: u32, pad: u32) -> f64 {
    let ids: Vec<Vec<u32>> = rows.iter().map(|(ids, _)| ids.clone()).collect();
    let mut out = run(entry, &ids, padded_len, pad).expect("runs");
    let hidden = rows[0].1.len();
    let answers: Vec<f32> = out.output_mut::<f32>(0).to_vec();
    assert_eq!(answers.len(), rows.len() * hidden);
    rows.iter().zip(answers.chunks_exact(hidden)).map(|((_, want), got)| cosine(want, got)).fold(1.0, f64::min)
}

/// Alone, and together with rows of other lengths behind different padding: always the reference's answer.
fn encoder_equals_its_reference(entry: &ModelEntry, rows: &[(Vec<u32>, Vec<f32>)]) {
    let buckets = &entry.manifest.batching.buckets;
    let bucket = |len: usize| *buckets.iter().find(|bucket| **bucket as usize >= len).expect("has a bucket");

    let mut alone: f64 = 1.0;
    for row in rows {
        let row = std::slice::from_ref(row);
        let len = row[0].0.len();
        alone = alone.min(worst_cosine(entry, row, len as u32, 0)).min(worst_cosine(entry, row, bucket(len), 0));
    }
    // In the order they come, so that a batch holds neighbours of very different lengths.
    let mut together: f64 = 1.0;
    for batch in rows.chunks(5) {
        let longest = batch.iter().map(|(ids, _)| ids.len()).max().expect("chunks are not empty");
        together = together.min(worst_cosine(entry, batch, bucket(longest), 0));
        together = together.min(worst_cosine(entry, batch, bucket(longest), 42));
    }
    println!("{}: worst cosine alone {alone:.8}, in mixed batches {together:.8}", entry.name());
    assert!(alone >= 0.9999, "alone: {alone}");
    assert!(together >= 0.9999, "in mixed batches: {together}");
}

fn tiny_bert_rows() -> Vec<(Vec<u32>, Vec<f32>)> {
    let expected = fixture("tiny_bert_expected.safetensors");
    let mut ids = words(&expected["ids"]).into_iter();
    let embeddings = floats(&expected["embeddings"]);
    let lengths = words(&expected["lengths"]);
    let hidden = embeddings.len() / lengths.len();
    (lengths.iter().zip(embeddings.chunks_exact(hidden)))
        .map(|(len, embedding)| (ids.by_ref().take(*len as usize).collect(), embedding.to_vec()))
        .collect()
}

fn minilm_rows() -> Vec<(String, Vec<u32>, Vec<f32>)> {
    let text = std::fs::read_to_string(root().join("tests/fixtures/minilm.json")).expect("the fixture is committed");
    let json: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    let rows = json["sentences"].as_array().expect("has sentences");
    (rows.iter())
        .map(|row| {
            let text = row["text"].as_str().expect("has text").to_owned();
            let ids = row["ids"].as_array().expect("has ids").iter().map(|id| id.as_u64().expect("is an id") as u32);
            let embedding = row["embedding"].as_array().expect("has an embedding").iter();
            (text, ids.collect(), embedding.map(|value| value.as_f64().expect("is a number") as f32).collect())
        })
        .collect()
}

#[test]
fn digits_is_right_on_at_least_97_percent_of_the_held_out_images_and_equals_pytorch() {
    let held_out = fixture("digits.safetensors");
    let (images, labels) = (floats(&held_out["images"]), words(&held_out["labels"]));
    let reference = floats(&held_out["logits"]);
    let entry = load(&root().join("models"), "digits");

    let rows: Vec<Vec<f32>> = images.chunks_exact(64).map(<[f32]>::to_vec).collect();
    let mut logits = Vec::new();
    for batch in rows.chunks(32) {
        logits.extend_from_slice(run(&entry, batch, 1, 0.0).expect("runs").output_mut::<f32>(0));
    }
    let apart = logits.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let right = (logits.chunks_exact(10).zip(&labels))
        .filter(|(row, label)| {
            let best = (0..10).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("there are ten");
            best == **label as usize
        })
        .count();
    let accuracy = right as f64 / labels.len() as f64;
    println!("digits: accuracy {accuracy:.4} ({right} of {}), logits at most {apart:.1e} from PyTorch's", labels.len());
    assert_eq!(labels.len(), 360, "the whole held-out fifth");
    assert!(accuracy >= 0.97, "accuracy {accuracy}");
    assert!(apart <= 1e-3, "logits differ by {apart}");
}

#[test]
fn tiny_bert_equals_its_reference_alone_and_in_mixed_batches() {
    let rows = tiny_bert_rows();
    assert_eq!(rows.len(), 12);
    encoder_equals_its_reference(&load(&root().join("tests/fixtures"), "tiny_bert"), &rows);
}

#[test]
fn minilm_equals_its_reference_alone_and_in_mixed_batches() {
    let Some(entry) = minilm() else { return };
    let rows: Vec<_> = minilm_rows().into_iter().map(|(_, ids, embedding)| (ids, embedding)).collect();
    encoder_equals_its_reference(&entry, &rows);
}

#[test]
fn minilm_tokenizes_as_its_reference_does() {
    let Some(entry) = minilm() else { return };
    let tokenizer = entry.tokenizer.expect("minilm takes text");
    for (text, ids, _) in minilm_rows() {
        let tokens = tokenizer.encode(&text).expect("is within the limits");
        assert_eq!(tokens.ids, ids, "{text:?}");
        assert_eq!(tokens.truncated_from, None);
    }
}

/// The same model, its layers computed in 8 bits.
fn in_int8(directory: &Path, name: &str) -> (tempfile::TempDir, ModelEntry) {
    let manifest = std::fs::read_to_string(directory.join(name).join("model.toml")).expect("has a manifest");
    assert_eq!(manifest.matches("\n[model]\n").count(), 1, "a table of parameters");
    let manifest = manifest.replace("\n[model]\n", "\n[model]\nprecision = \"int8\"\n");
    let quantised = directory_with(name, &manifest);
    std::os::unix::fs::symlink(directory.join(name).join("1"), quantised.path().join(name).join("1")).expect("links");
    let entry = load(quantised.path(), name);
    (quantised, entry)
}

/// The worst cosine of rows alone and in mixed batches, padded and packed, with their references.
fn worst_cosines(entry: &ModelEntry, rows: &[(Vec<u32>, Vec<f32>)]) -> (f64, f64) {
    let mut worst = [1.0f64, 1.0];
    for (at, together) in [1, 5].into_iter().enumerate() {
        for batch in rows.chunks(together) {
            let longest = batch.iter().map(|(ids, _)| ids.len()).max().expect("chunks are not empty") as u32;
            worst[at] = worst[at].min(worst_cosine(entry, batch, longest, 42)).min(worst_cosine_packed(entry, batch));
        }
    }
    println!("{} in int8: worst cosine alone {:.5}, in mixed batches {:.5}", entry.name(), worst[0], worst[1]);
    (worst[0], worst[1])
}

/// As `worst_cosine`, with the rows end to end.
fn worst_cosine_packed(entry: &ModelEntry, rows: &[(Vec<u32>, Vec<f32>)]) -> f64 {
    let contract = entry.model.contract();
    let ids: Vec<u32> = rows.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
    let lens: Vec<u32> = rows.iter().map(|(ids, _)| ids.len() as u32).collect();
    let padded_len = *lens.iter().max().expect("there are rows");
    let mut input = AlignedBytes::default();
    input.set_len(ids.len() * 4);
    input.as_mut_slice::<u32>().copy_from_slice(&ids);
    let (inputs, layout) = ([input], Layout::Packed);
    let mut out = BatchOutput::default();
    out.prepare(contract, layout, &lens, padded_len);
    let view = BatchView { contract, layout, rows: rows.len() as u32, padded_len, lens: &lens, inputs: &inputs };
    entry.model.instantiate().expect("makes an instance").run(view, &mut out).expect("runs");
    let answers = out.output_mut::<f32>(0).chunks_exact(rows[0].1.len());
    rows.iter().zip(answers).map(|((_, want), got)| cosine(want, got)).fold(1.0, f64::min)
}

#[test]
fn tiny_bert_in_int8_is_near_its_reference_alone_and_in_mixed_batches() {
    let (_directory, entry) = in_int8(&root().join("tests/fixtures"), "tiny_bert");
    let (alone, together) = worst_cosines(&entry, &tiny_bert_rows());
    assert!(alone >= 0.999 && together >= 0.999, "{alone}, {together}");
}

#[test]
fn minilm_in_int8_is_near_its_reference_and_smaller_alone_and_in_mixed_batches() {
    let Some(whole) = minilm() else { return };
    let (_directory, entry) = in_int8(&root().join("models"), "minilm");
    let rows: Vec<_> = minilm_rows().into_iter().map(|(_, ids, embedding)| (ids, embedding)).collect();
    let (alone, together) = worst_cosines(&entry, &rows);
    assert!(alone >= 0.99 && together >= 0.99, "{alone}, {together}");
    // Each token has its own range, so that its batch does not matter.
    assert!((alone - together).abs() <= 1e-6, "{alone}, {together}");
    let (whole, small) = (whole.model.weight_bytes(), entry.model.weight_bytes());
    println!("minilm: {whole} bytes of weights, {small} in int8");
    // The embeddings stay as they are, and are half of it; the rest is a quarter.
    assert!(small * 10 < whole * 7, "{small} of {whole}");
}

/// The scheduler never makes such a row, but a batch whose rows were all cancelled may look like it.
#[test]
fn a_row_without_any_real_token_gives_zeros_and_leaves_its_mates_alone() {
    let entry = load(&root().join("tests/fixtures"), "tiny_bert");
    let (ids, want) = tiny_bert_rows().swap_remove(4);
    for batch in [vec![vec![]], vec![vec![], ids.clone(), vec![]]] {
        let mut out = run(&entry, &batch, 16, 3).expect("runs");
        for (row, got) in batch.iter().zip(out.output_mut::<f32>(0).chunks_exact(want.len())) {
            assert!(got.iter().all(|value| value.is_finite()), "{got:?}");
            if row.is_empty() {
                assert!(got.iter().all(|value| *value == 0.0), "{got:?}");
            } else {
                assert!(cosine(got, &want) >= 0.9999);
            }
        }
    }
}

#[test]
fn echo_returns_every_bit_padding_included() {
    let entry = load(&root().join("models"), "echo");
    let rows = vec![vec![1.5f32, f32::NAN, -0.0], vec![f32::INFINITY], vec![0.25; 8]];
    let mut out = run(&entry, &rows, 8, 7.0).expect("runs");
    let bits: Vec<u32> = out.output_mut::<f32>(0).iter().map(|value| value.to_bits()).collect();
    for (row, got) in rows.iter().zip(bits.chunks_exact(8)) {
        let mut want: Vec<u32> = row.iter().map(|value| value.to_bits()).collect();
        want.resize(8, 7.0f32.to_bits());
        assert_eq!(got, want);
    }
}

#[test]
fn sleep_returns_its_input() {
    let entry = load(&root().join("models"), "sleep");
    let mut out = run(&entry, &[vec![0u32], vec![300], vec![20]], 1, 0).expect("runs");
    assert_eq!(out.output_mut::<u32>(0), [0, 300, 20]);
}

const FAULTY: &str = r#"
architecture = "faulty"
version = "1"
[[input]]
name = "behaviour"
dtype = "u32"
shape = [1]
[[output]]
name = "value"
dtype = "f32"
shape = [1]
[batching]
rows_max = 8
"#;

/// A models directory with one model in it.
fn directory_with(name: &str, manifest: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(directory.path().join(name)).expect("makes the folder");
    std::fs::write(directory.path().join(name).join("model.toml"), manifest).expect("writes the manifest");
    directory
}

#[test]
fn faulty_fails_in_the_way_it_is_told() {
    let directory = directory_with("faulty", FAULTY);
    let entry = load(directory.path(), "faulty");
    let mut out = run(&entry, &[vec![0u32], vec![3], vec![5]], 1, 0).expect("runs");
    let answers = out.output_mut::<f32>(0);
    assert_eq!((answers[0], answers[2]), (0.0, 5.0));
    assert!(answers[1].is_nan());
    let error = run(&entry, &[vec![0u32], vec![2]], 1, 0).expect_err("row 1 asks for an error");
    assert_eq!(error.0, "row 1 asked for an error");
    let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| drop(run(&entry, &[vec![1u32]], 1, 0))));
    assert!(panicked.is_err());
}

#[test]
fn the_models_directory_of_the_repository_loads() {
    let repository = repository::load_all(&root().join("models"), &LoadOptions::default()).expect("loads");
    let mut names: Vec<&str> = repository.models.iter().map(ModelEntry::name).collect();
    names.extend(repository.skipped.iter().map(|skipped| skipped.name.as_str()));
    names.sort();
    assert_eq!(names, ["digits", "echo", "minilm", "sleep"]);
}

/// Copies a model's folder, so that a test can spoil the copy.
fn copy_of(from: &Path, name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let to = directory.path().join(name);
    std::fs::create_dir_all(to.join("1")).expect("makes the folders");
    for file in ["model.toml", "1/weights.safetensors"] {
        std::fs::copy(from.join(name).join(file), to.join(file)).expect("copies");
    }
    directory
}

fn error_of(directory: &Path, name: &str) -> String {
    repository::load(directory, name, &LoadOptions::default()).expect_err("is refused").to_string()
}

#[test]
fn weights_that_are_missing_stop_the_load_unless_the_manifest_says_optional() {
    let directory = copy_of(&root().join("tests/fixtures"), "tiny_bert");
    std::fs::remove_file(directory.path().join("tiny_bert/1/weights.safetensors")).expect("removes");
    let error = error_of(directory.path(), "tiny_bert");
    assert!(error.starts_with("model tiny_bert: ") && error.ends_with("the weights file is not there"), "{error}");

    let manifest = directory.path().join("tiny_bert/model.toml");
    let text = std::fs::read_to_string(&manifest).expect("reads");
    let text = text.replace("[weights]", "[weights]\noptional = true\nfetch = \"get it\"");
    std::fs::write(&manifest, text).expect("writes");
    let repository = repository::load_all(directory.path(), &LoadOptions::default()).expect("is skipped");
    assert!(repository.models.is_empty());
    let reason = &repository.skipped[0].reason;
    assert!(reason.starts_with("model tiny_bert is skipped: "), "{reason}");
    assert!(reason.ends_with("weights.safetensors is not there; `get it` fetches it"), "{reason}");
}

#[test]
fn weights_that_are_not_exactly_the_models_stop_the_load_and_name_the_tensor() {
    type Spoil = fn(&mut HashMap<String, Tensor>);
    let cases: [(Spoil, &str); 6] = [
        (
            |tensors| drop(tensors.remove("encoder.layer.1.output.dense.bias")),
            "expected a tensor `encoder.layer.1.output.dense.bias`, there is none; the nearest name is",
        ),
        (
            |tensors| drop(tensors.insert("pooler.dense.bias".into(), zeros(&[32]))),
            "the model has no place for `pooler.dense.bias`",
        ),
        (
            |tensors| drop(tensors.insert("embeddings.LayerNorm.bias".into(), zeros(&[31]))),
            "tensor `embeddings.LayerNorm.bias` is expected to have shape [32], the file has [31]",
        ),
        (
            |tensors| {
                let half = tensors["embeddings.LayerNorm.bias"].to_dtype(CandleDType::F16).expect("converts");
                tensors.insert("embeddings.LayerNorm.bias".into(), half);
            },
            "tensor `embeddings.LayerNorm.bias` is expected to be F32, the file has F16",
        ),
        (
            |tensors| {
                let nan = Tensor::from_vec(vec![f32::NAN; 32], 32, &Device::Cpu).expect("makes a tensor");
                tensors.insert("embeddings.LayerNorm.bias".into(), nan);
            },
            "tensor `embeddings.LayerNorm.bias` is expected to hold finite numbers, element 0 is NaN",
        ),
        (
            |tensors| {
                let renamed = tensors.remove("embeddings.LayerNorm.bias").expect("is there");
                tensors.insert("embeddings.LayerNorm.beta".into(), renamed);
            },
            "there is none; the nearest name is `embeddings.LayerNorm.beta`",
        ),
    ];
    for (spoil, expected) in cases {
        let directory = copy_of(&root().join("tests/fixtures"), "tiny_bert");
        let file = directory.path().join("tiny_bert/1/weights.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).expect("loads");
        spoil(&mut tensors);
        candle_core::safetensors::save(&tensors, &file).expect("saves");
        let error = error_of(directory.path(), "tiny_bert");
        assert!(error.starts_with("model tiny_bert: "), "{error}");
        assert!(error.contains(expected), "{error}\nexpected: {expected}");
    }
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, CandleDType::F32, &Device::Cpu).expect("makes a tensor")
}

#[test]
fn names_of_another_checkpoint_are_mapped() {
    let directory = copy_of(&root().join("tests/fixtures"), "tiny_bert");
    let file = directory.path().join("tiny_bert/1/weights.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).expect("loads");
    let mut renamed: HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (format!("bert.{name}"), tensor)).collect();
    let bias = renamed.remove("bert.embeddings.LayerNorm.bias").expect("is there");
    renamed.insert("norm0.beta".into(), bias);
    renamed.insert("cls.predictions.bias".into(), zeros(&[3]));
    candle_core::safetensors::save(&renamed, &file).expect("saves");

    let manifest = directory.path().join("tiny_bert/model.toml");
    let text = std::fs::read_to_string(&manifest).expect("reads");
    let weights = "[weights]\nprefix = \"bert.\"\nignore = [\"cls.\"]\n\
                   map = { \"embeddings.LayerNorm.bias\" = \"norm0.beta\" }";
    std::fs::write(&manifest, text.replace("[weights]", weights)).expect("writes");
    encoder_equals_its_reference(&load(directory.path(), "tiny_bert"), &tiny_bert_rows());

    // A name that the model does not ask for is a slip, not a wish.
    let weights = weights.replace("{ ", "{ \"embeddings.LayerNorm.gamma\" = \"x\", ");
    std::fs::write(&manifest, text.replace("[weights]", &weights)).expect("writes");
    let error = error_of(directory.path(), "tiny_bert");
    assert!(error.contains("[weights] map renames `embeddings.LayerNorm.gamma`"), "{error}");
}

#[test]
fn files_that_are_wrong_in_other_ways_are_refused_with_the_reason() {
    let directory = copy_of(&root().join("models"), "digits");
    let file = directory.path().join("digits/1/weights.safetensors");
    let mut bytes = std::fs::read(&file).expect("reads");
    *bytes.last_mut().expect("is not empty") ^= 1;
    std::fs::write(&file, &bytes).expect("writes");
    let error = error_of(directory.path(), "digits");
    assert!(error.contains("the manifest expects SHA-256 "), "{error}");

    let small = LoadOptions { weight_bytes_max: 1000, ..LoadOptions::default() };
    match repository::load(directory.path(), "digits", &small) {
        Err(repository::RepositoryError::Weights { error, .. }) => match *error.fault {
            WeightsFault::TooLarge { expected, received } => {
                assert_eq!((expected, received), (1000, bytes.len() as u64));
            }
            _ => panic!("{error}"),
        },
        other => panic!("{other:?}"),
    }

    let directory = copy_of(&root().join("tests/fixtures"), "tiny_bert");
    for spoiled in [&b""[..], b"short", &[0xFF; 64], b"\x02\0\0\0\0\0\0\0{}"] {
        std::fs::write(directory.path().join("tiny_bert/1/weights.safetensors"), spoiled).expect("writes");
        let error = error_of(directory.path(), "tiny_bert");
        assert!(error.contains("is not a safetensors file") || error.contains("there is none"), "{error}");
    }
}

#[test]
fn folders_that_are_no_models_are_refused_by_name() {
    let directory = directory_with("faulty", FAULTY);
    std::fs::write(directory.path().join("README.md"), "not a model").expect("writes");
    std::fs::create_dir(directory.path().join(".hidden")).expect("makes the folder");
    assert_eq!(repository::names(directory.path()).expect("reads"), ["faulty"]);

    std::fs::create_dir(directory.path().join("empty")).expect("makes the folder");
    let error = repository::load_all(directory.path(), &LoadOptions::default()).expect_err("has no manifest");
    assert!(error.to_string().starts_with("model empty: "), "{error}");
    assert!(error.to_string().contains("model.toml: cannot be read"), "{error}");

    std::fs::create_dir(directory.path().join("Not A Name")).expect("makes the folder");
    let error = repository::names(directory.path()).expect_err("is no name");
    assert!(error.to_string().contains("\"Not A Name\" is no model name"), "{error}");
    assert!(repository::load(directory.path(), "../faulty", &LoadOptions::default()).is_err());

    let error = repository::names(&directory.path().join("nowhere")).expect_err("is not there");
    assert!(error.to_string().contains("nowhere: cannot be read"), "{error}");
}

#[test]
fn a_precision_given_at_the_load_takes_the_place_of_the_manifests() {
    let rows = tiny_bert_rows();
    let all: Vec<_> = rows.iter().take(5).collect();
    let answer = |precision| {
        let options = LoadOptions { precision: Some(precision), ..LoadOptions::default() };
        let loaded = repository::load(&root().join("tests/fixtures"), "tiny_bert", &options).expect("loads");
        let Loaded::Model(entry) = loaded else { panic!("its weights are committed") };
        let mut model = entry.model.instantiate().expect("makes an instance");
        answers(&entry, &mut *model, &all, Layout::Packed)
    };
    let (f32s, int8s) = (answer(Precision::F32), answer(Precision::Int8));
    assert_ne!(f32s, int8s);
    assert!(cosine(&f32s, &int8s) >= 0.999, "{}", cosine(&f32s, &int8s));
}
