//! What several targets need: a contract, and bytes that are handed out piece by piece.

use std::sync::Arc;

use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::vocab::DType;

/// Token ids of up to 16, back as they came.
pub fn echo() -> Arc<Contract> {
    let spec = |nonfinite| TensorSpec {
        name: "ids".into(),
        dtype: DType::U32,
        shape: vec![Dim::Named("tokens".into())],
        pad: 7.0,
        range: None,
        nonfinite,
    };
    let contract = Contract {
        name: "echo".into(),
        version: "1".into(),
        architecture: "echo".into(),
        inputs: vec![spec(NonFinite::Allow)],
        outputs: vec![TensorSpec { pad: 0.0, ..spec(NonFinite::Allow) }],
        length: Some(Length { name: "tokens".into(), min: 1, max: 16 }),
        text: None,
        rows_max: 4,
    };
    Arc::new(contract.checked().expect("sound"))
}

/// An input as a source of small numbers; 0 for ever at its end.
pub struct Source<'a>(pub &'a [u8]);

impl<'a> Source<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// At most so many bytes, as there are.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
