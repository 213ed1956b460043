//! The parameters of an encoder, taken from a file by the names that its family gives them.
//!
//! Always true
//! - Every shape is the one that the manifest implies; what a file has under another name or shape is an error that names it.
//! - Segment 0 and the unused first positions of a family are folded away here: nobody after this file knows of them.
//!
//! Elsewhere: prefixes, maps and what may be left over (weights.rs).

use candle_core::Tensor;

use crate::models::manifest::{Activation, BertParams, Family, Head};
use crate::models::weights::{Weights, WeightsError};

/// y = W·x + b.
pub struct Dense {
    /// `[out, in]`, as checkpoints have it.
    pub weight: Tensor,
    pub bias: Tensor,
}

pub struct Norm {
    pub weight: Tensor,
    pub bias: Tensor,
}

pub struct Layer {
    pub query: Dense,
    pub key: Dense,
    pub value: Dense,
    pub attention_out: Dense,
    pub attention_norm: Norm,
    pub inner: Dense,
    pub out: Dense,
    pub norm: Norm,
}

/// What stands between a head's product and the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Tanh,
    Relu,
    /// The last one.
    Nothing,
}

pub struct Checkpoint {
    /// `[vocab, hidden]`
    pub words: Tensor,
    /// `[positions that can be used, hidden]`, with the embedding of segment 0 added where the family has segments.
    pub places: Tensor,
    /// `[segments, hidden]` less that of segment 0; only where callers say segments.
    pub segments: Option<Tensor>,
    pub norm: Norm,
    pub layers: Vec<Layer>,
    pub head: Vec<(Dense, Between)>,
}

impl Checkpoint {
    /// Takes every parameter out of `weights`. `segmented`: callers say segments.
    pub fn take(params: &BertParams, segmented: bool, weights: &mut Weights) -> Result<Checkpoint, WeightsError> {
        let h = params.hidden;
        let words = weights.take("embeddings.word_embeddings.weight", &[params.vocab, h])?;
        let positions = weights.take("embeddings.position_embeddings.weight", &[params.positions, h])?;
        let folded = "embeddings.position_embeddings.weight";
        let offset = params.family.first_position();
        let usable = params.positions - offset;
        let mut places = positions.narrow(0, offset, usable).map_err(|e| weights.device_error(folded, e))?;
        let mut segments = None;
        if params.family != Family::Distilbert {
            let all = weights.take("embeddings.token_type_embeddings.weight", &[params.segments, h])?;
            let fold = || {
                let first = all.narrow(0, 0, 1)?;
                let others = if segmented { Some(all.broadcast_sub(&first)?) } else { None };
                Ok((places.broadcast_add(&first)?, others))
            };
            (places, segments) = fold().map_err(|e| weights.device_error(folded, e))?;
        }
        let norm = norm(weights, "embeddings.LayerNorm", h)?;
        let layers = (0..params.layers).map(|n| layer(params, weights, n)).collect::<Result<_, _>>()?;
        Ok(Checkpoint { words, places, segments, norm, layers, head: head(params, weights)? })
    }
}

fn norm(weights: &mut Weights, name: &str, size: usize) -> Result<Norm, WeightsError> {
    let weight = weights.take(&format!("{name}.weight"), &[size])?;
    Ok(Norm { weight, bias: weights.take(&format!("{name}.bias"), &[size])? })
}

fn dense(weights: &mut Weights, name: &str, input: usize, output: usize) -> Result<Dense, WeightsError> {
    let weight = weights.take(&format!("{name}.weight"), &[output, input])?;
    Ok(Dense { weight, bias: weights.take(&format!("{name}.bias"), &[output])? })
}

/// A head's parameters stand beside the encoder, not under its prefix.
fn beside(weights: &mut Weights, name: &str, input: usize, output: usize) -> Result<Dense, WeightsError> {
    let weight = weights.take_beside(&format!("{name}.weight"), &[output, input])?;
    Ok(Dense { weight, bias: weights.take_beside(&format!("{name}.bias"), &[output])? })
}

/// The names of a layer's parameters, in the order of [`Layer`].
fn names(family: Family) -> [&'static str; 8] {
    match family {
        Family::Bert | Family::Roberta => [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ],
        Family::Distilbert => [
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "sa_layer_norm",
            "ffn.lin1",
            "ffn.lin2",
            "output_layer_norm",
        ],
    }
}

fn layer(params: &BertParams, weights: &mut Weights, n: usize) -> Result<Layer, WeightsError> {
    let at = match params.family {
        Family::Bert | Family::Roberta => format!("encoder.layer.{n}"),
        Family::Distilbert => format!("transformer.layer.{n}"),
    };
    let [query, key, value, attention_out, attention_norm, inner, out, last] =
        names(params.family).map(|name| format!("{at}.{name}"));
    let (h, i) = (params.hidden, params.intermediate);
    Ok(Layer {
        query: dense(weights, &query, h, h)?,
        key: dense(weights, &key, h, h)?,
        value: dense(weights, &value, h, h)?,
        attention_out: dense(weights, &attention_out, h, h)?,
        attention_norm: norm(weights, &attention_norm, h)?,
        inner: dense(weights, &inner, h, i)?,
        out: dense(weights, &out, i, h)?,
        norm: norm(weights, &last, h)?,
    })
}

fn head(params: &BertParams, weights: &mut Weights) -> Result<Vec<(Dense, Between)>, WeightsError> {
    let Head::Classify = params.head else { return Ok(Vec::new()) };
    let (h, labels) = (params.hidden, params.labels.unwrap_or(1));
    let (first, between, last) = match params.family {
        Family::Bert => (dense(weights, "pooler.dense", h, h)?, Between::Tanh, "classifier"),
        Family::Roberta => (beside(weights, "classifier.dense", h, h)?, Between::Tanh, "classifier.out_proj"),
        Family::Distilbert => (beside(weights, "pre_classifier", h, h)?, Between::Relu, "classifier"),
    };
    Ok(vec![(first, between), (beside(weights, last, h, labels)?, Between::Nothing)])
}

impl Activation {
    /// As candle computes it: the reference.
    pub(super) fn reference(self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Activation::GeluErf => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Relu => x.relu(),
        }
    }
}
