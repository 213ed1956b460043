//! `ferry devices`: what it says on a machine without a GPU, and that it says so in both forms.

use std::process::{Command, Output};

fn devices(arguments: &[&str]) -> Output {
    let output =
        Command::new(env!("CARGO_BIN_EXE_ferry")).arg("devices").args(arguments).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn the_processor_is_there_and_a_missing_gpu_has_its_reason() {
    let output = devices(&["--json"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert!(document["cpu"]["cores"].as_u64().is_some_and(|cores| cores > 0), "{document}");
    let sets = document["cpu"]["instruction_sets"].as_array().expect("a list");
    assert_eq!(
        sets.last().and_then(|set| set.as_str()),
        Some("scalar"),
        "the plain one is always there, and last: {document}"
    );
    for set in sets {
        let known = ["avx512", "avx2+fma", "neon", "scalar"];
        assert!(known.contains(&set.as_str().expect("a name")), "a name of ours: {document}");
    }
    let cuda = &document["cuda"];
    assert_eq!(cuda["built"].as_bool(), Some(cfg!(feature = "cuda")), "{document}");
    let gpus = cuda["gpus"].as_array().expect("a list");
    assert_eq!(gpus.is_empty(), cuda["problem"].is_string(), "GPUs, or why there are none: {document}");
}

#[test]
fn a_build_without_cuda_says_how_to_build_with_it() {
    let text = String::from_utf8(devices(&[]).stdout).expect("text");
    assert!(text.starts_with("cpu "), "{text}");
    if cfg!(not(feature = "cuda")) {
        assert!(text.contains("built without CUDA") && text.contains("--features cuda"), "{text}");
    }
}
