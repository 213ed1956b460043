//! The encoder family against transformers: RoBERTa, XLM-R and DistilBERT beside BERT, classifiers and cross-encoders, and
//! each activation and pooling. The references were made by tools/make_family_fixtures.py.
//!
//! Elsewhere: BERT with the real weights, and weights that are wrong (models.rs).

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use ferry::executor::batch::{AlignedBytes, BatchOutput, BatchView};
use ferry::models::repository::{self, LoadOptions, Loaded, ModelEntry};
use ferry::vocab::Layout;

/// Largest difference of any component. Embeddings have length 1; logits are below 4.
const APART_MAX: f32 = 2e-5;

/// What each folder is for. A fixture that is lost would be a test that passes.
const FAMILY: [&str; 10] = [
    "bert_cls",
    "bert_cross",
    "bert_gelu_tanh",
    "bert_max",
    "bert_relu",
    "distilbert",
    "distilbert_classify",
    "roberta",
    "roberta_classify",
    "xlm_roberta",
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/family")
}

fn load(name: &str) -> ModelEntry {
    match repository::load(&directory(), name, &LoadOptions::default()) {
        Ok(Loaded::Model(entry)) => *entry,
        Ok(Loaded::Skipped(skipped)) => panic!("{}", skipped.reason),
        Err(error) => panic!("{error}"),
    }
}

/// One request and its answer. `inputs` are in the contract's order: ids, and segments where the model takes them.
struct Row {
    inputs: Vec<Vec<u32>>,
    want: Vec<f32>,
}

impl Row {
    fn len(&self) -> usize {
        self.inputs[0].len()
    }
}

fn rows_of(entry: &ModelEntry) -> Vec<Row> {
    let file = directory().join(entry.name()).join("expected.safetensors");
    let expected = candle_core::safetensors::load(&file, &Device::Cpu)
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let words = |tensor: &Tensor| tensor.to_vec1::<u32>().expect("is a list of u32");
    let outputs = expected["outputs"].to_vec2::<f32>().expect("is a table of f32");
    let inputs: Vec<Vec<u32>> = entry.model.contract().inputs.iter().map(|spec| words(&expected[&spec.name])).collect();
    let mut start = 0;
    (words(&expected["lengths"]).iter().zip(outputs))
        .map(|(len, want)| {
            let tokens = start..start + *len as usize;
            start = tokens.end;
            Row { inputs: inputs.iter().map(|input| input[tokens.clone()].to_vec()).collect(), want }
        })
        .collect()
}

/// Largest difference between a batch's answers and their references. Padding holds the largest value that the contract
/// allows, so that a model that looks at it is found.
fn apart(entry: &ModelEntry, batch: &[&Row], padded_len: usize) -> f32 {
    // Not f32::max, which would pass over a NaN.
    let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    larger(apart_in(entry, batch, padded_len, Layout::Padded), apart_in(entry, batch, padded_len, Layout::Packed))
}

fn apart_in(entry: &ModelEntry, batch: &[&Row], padded_len: usize, layout: Layout) -> f32 {
    let contract = entry.model.contract();
    let (rows, padded_len) = (batch.len() as u32, padded_len as u32);
    let lens: Vec<u32> = batch.iter().map(|row| row.len() as u32).collect();
    let inputs: Vec<AlignedBytes> = (contract.inputs.iter().enumerate())
        .map(|(index, spec)| {
            let pad = spec.range.expect("ids and segments have a range")[1] as u32;
            let mut input = AlignedBytes::default();
            if layout == Layout::Packed {
                let all: Vec<u32> = batch.iter().flat_map(|row| row.inputs[index].iter().copied()).collect();
                input.set_len(all.len() * 4);
                input.as_mut_slice::<u32>().copy_from_slice(&all);
                return input;
            }
            input.set_len(batch.len() * spec.row_bytes(padded_len));
            let places = input.as_mut_slice::<u32>().chunks_exact_mut(spec.row_elements(padded_len));
            for (row, place) in batch.iter().zip(places) {
                let (real, padding) = place.split_at_mut(row.len());
                real.copy_from_slice(&row.inputs[index]);
                padding.fill(pad);
            }
            input
        })
        .collect();
    let mut out = BatchOutput::default();
    out.prepare(contract, layout, &lens, padded_len);
    // What a model forgets to write is found here as NaN.
    for output in &mut out.outputs {
        output.bytes_mut().fill(0xFF);
    }
    let view = BatchView { contract, layout, rows, padded_len, lens: &lens, inputs: &inputs };
    let mut model = entry.model.instantiate().expect("makes an instance");
    model.run(view, &mut out).expect("runs");

    let got = out.output_mut::<f32>(0);
    let want: Vec<f32> = batch.iter().flat_map(|row| row.want.iter().copied()).collect();
    assert_eq!(got.len(), want.len(), "{}: one answer per row, of the reference's size", entry.name());
    // Not f32::max, which would pass over a NaN.
    got.iter()
        .zip(&want)
        .map(|(got, want)| (got - want).abs())
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

#[test]
fn every_fixture_of_the_family_has_a_name_here() {
    let mut names = repository::names(&directory()).expect("reads");
    names.sort();
    assert_eq!(names, FAMILY);
}

#[test]
fn each_of_the_family_equals_its_reference_alone_and_in_mixed_batches() {
    for name in FAMILY {
        let entry = load(name);
        let rows = rows_of(&entry);
        assert_eq!(rows.len(), 12, "{name}");
        let buckets = &entry.manifest.batching.buckets;
        let bucket =
            |len: usize| *buckets.iter().find(|bucket| **bucket as usize >= len).expect("has a bucket") as usize;

        for row in &rows {
            for padded_len in [row.len(), bucket(row.len())] {
                let apart = apart(&entry, &[row], padded_len);
                assert!(apart <= APART_MAX, "{name}: {} tokens padded to {padded_len}: {apart:e} apart", row.len());
            }
        }
        // In the order they come, so that a batch holds neighbours of very different lengths, and all in one.
        for size in [5, rows.len()] {
            for batch in rows.chunks(size) {
                let batch: Vec<&Row> = batch.iter().collect();
                let longest = batch.iter().map(|row| row.len()).max().expect("chunks are not empty");
                let apart = apart(&entry, &batch, bucket(longest));
                assert!(apart <= APART_MAX, "{name}: {} rows padded to {longest}: {apart:e} apart", batch.len());
            }
        }
    }
}

/// The second text of a pair is told apart by its segments alone.
#[test]
fn segments_move_the_score_of_a_cross_encoder() {
    let entry = load("bert_cross");
    let mut rows = rows_of(&entry);
    let pair = rows.iter_mut().find(|row| row.inputs[1].contains(&1)).expect("the fixture has pairs");
    pair.inputs[1].fill(0);
    let apart = apart(&entry, &[pair], pair.len());
    assert!(apart > 100.0 * APART_MAX, "the score moved by {apart:e} only");
}
