//! Any bytes as a safetensors file of a small model.
//!
//! Fails on a panic, and on a tensor that was handed out though its shape, type or numbers are not as asked for. Input: raw, or a
//! header that is JSON with its length mended.
#![no_main]

use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

use candle_core::Device;
use ferry::models::weights::{WeightNames, Weights};
use libfuzzer_sys::fuzz_target;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = if PathBuf::from("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    folder.join(format!("ferry-fuzz-weights-{}", std::process::id()))
});

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    let mut file = std::fs::File::create(&*FILE).expect("a file in memory");
    if choice & 1 == 1 {
        // The header goes to the last brace; what is behind is data.
        let end = bytes.iter().rposition(|byte| *byte == b'}').map_or(0, |at| at + 1);
        file.write_all(&(end as u64).to_le_bytes()).expect("it is written");
    }
    file.write_all(bytes).expect("it is written");
    drop(file);
    let names = WeightNames { ignore: vec!["extra.".into()], ..WeightNames::default() };
    let Ok(mut weights) = Weights::open(&FILE, 1 << 20, None, names, &Device::Cpu) else { return };
    for (name, shape) in [("a", &[2usize, 3] as &[usize]), ("b", &[4]), ("c", &[])] {
        if let Ok(tensor) = weights.take(name, shape) {
            assert_eq!(tensor.dims(), shape);
            let values = tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).expect("f32");
            assert!(values.iter().all(|value| value.is_finite()));
        }
    }
    assert!(weights.taken_bytes() <= input.len() as u64);
    let _ = weights.finish();
});
