//! The sources under test, taken in by path: `wire`, `vocab` and `contract` need five small dependencies, the whole
//! package a tensor library and a runtime, and all of it would be built again with the sanitizer.
//!
//! Always true
//! - Nothing is copied: these are the files of the main package, so a fuzzed byte meets the code that is served.

#[path = "../../../src/contract.rs"]
pub mod contract;
#[path = "../../../src/vocab.rs"]
pub mod vocab;
#[path = "../../../src/wire/mod.rs"]
pub mod wire;
