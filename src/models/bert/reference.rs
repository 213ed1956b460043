//! The encoder in candle's own operations, over padded rows: what the kernels are compared with, and what runs where there
//! are none.
//!
//! Always true
//! - Every value stays finite for a row without any real token: masked scores are a finite floor, not -inf, and a norm of 0
//!   divides by a small constant.

use candle_core::{D, Device, Tensor};
use candle_nn::ops::{layer_norm, softmax_last_dim};

use super::checkpoint::{Between, Checkpoint, Dense, Layer, Norm};
use crate::models::manifest::{BertParams, Pooling};

/// Added to the score of a padding token. Far below any real score, so that its share is exactly 0 in f32, and finite, so
/// that a row of padding alone gives equal shares instead of NaN.
const MASKED: f32 = -1e30;

/// Keeps the division by a row's length finite for a row of length zero.
const NORM_MIN: f64 = 1e-12;

/// The network with its parameters. Shared by all instances.
pub struct Reference {
    params: BertParams,
    checkpoint: Checkpoint,
    device: Device,
}

impl Reference {
    pub fn new(params: BertParams, checkpoint: Checkpoint, device: Device) -> Reference {
        Reference { params, checkpoint, device }
    }

    /// Answers `lengths.len()` rows of `len` ids each, row after row in `ids`; row i has `lengths[i]` real tokens. `segments`
    /// is as long as `ids`. Returns `[rows, hidden or labels]`.
    pub fn forward(
        &self,
        ids: &[u32],
        segments: Option<&[u32]>,
        len: usize,
        lengths: &[u32],
    ) -> candle_core::Result<Tensor> {
        let rows = lengths.len();
        assert_eq!(ids.len(), rows * len, "ids hold one place of `len` per row");
        let Checkpoint { words, places, segments: others, norm, layers, head } = &self.checkpoint;
        let h = self.params.hidden;
        let mask = Mask::new(len, lengths, &self.device)?;

        let ids = Tensor::from_slice(ids, rows * len, &self.device)?;
        let words = words.index_select(&ids, 0)?.reshape((rows, len, h))?;
        let mut x = words.broadcast_add(&places.narrow(0, 0, len)?)?;
        if let (Some(segments), Some(others)) = (segments, others) {
            let segments = Tensor::from_slice(segments, rows * len, &self.device)?;
            x = (x + others.index_select(&segments, 0)?.reshape((rows, len, h))?)?;
        }
        x = self.norm(&x.reshape((rows * len, h))?, norm)?;
        for layer in layers {
            let context = self.attend(&x, layer, len, &mask)?;
            x = self.norm(&(dense(&context, &layer.attention_out)? + x)?, &layer.attention_norm)?;
            let inner = self.params.activation.reference(&dense(&x, &layer.inner)?)?;
            x = self.norm(&(dense(&inner, &layer.out)? + x)?, &layer.norm)?;
        }

        let x = x.reshape((rows, len, h))?;
        let mut pooled = match self.params.pooling {
            Pooling::Mean => mask.shares.matmul(&x)?.squeeze(1)?,
            Pooling::Cls => x.narrow(1, 0, 1)?.squeeze(1)?,
            Pooling::Max => x.broadcast_add(&mask.floor.reshape((rows, len, 1))?)?.max(1)?,
        };
        if self.params.normalize {
            let norm = pooled.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(NORM_MIN)?;
            pooled = pooled.broadcast_div(&norm)?;
        }
        for (product, between) in head {
            pooled = dense(&pooled.contiguous()?, product)?;
            pooled = match between {
                Between::Tanh => pooled.tanh()?,
                Between::Relu => pooled.relu()?,
                Between::Nothing => pooled,
            };
        }
        Ok(pooled)
    }

    /// Scaled dot-product attention of all rows and heads; `[rows * len, hidden]` to the same.
    fn attend(&self, x: &Tensor, layer: &Layer, len: usize, mask: &Mask) -> candle_core::Result<Tensor> {
        let heads = self.params.heads;
        let size = self.params.hidden / heads;
        let rows = x.dim(0)? / len;
        let split = |part: &Dense| dense(x, part)?.reshape((rows, len, heads, size))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (split(&layer.query)?, split(&layer.key)?, split(&layer.value)?);
        let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (size as f64).sqrt())?;
        let shares = softmax_last_dim(&scores.broadcast_add(&mask.floor.reshape((rows, 1, 1, len))?)?)?;
        shares.matmul(&v)?.transpose(1, 2)?.reshape((rows * len, self.params.hidden))
    }

    fn norm(&self, x: &Tensor, norm: &Norm) -> candle_core::Result<Tensor> {
        layer_norm(x, &norm.weight, &norm.bias, self.params.layer_norm_eps as f32)
    }
}

fn dense(x: &Tensor, dense: &Dense) -> candle_core::Result<Tensor> {
    x.matmul(&dense.weight.t()?)?.broadcast_add(&dense.bias)
}

/// What of a batch is padding, in the two forms that are needed.
struct Mask {
    /// `[rows, len]`, 0 on real tokens and [`MASKED`] elsewhere.
    floor: Tensor,
    /// `[rows, 1, len]`, 1/length on real tokens and 0 elsewhere: the mean as a product.
    shares: Tensor,
}

impl Mask {
    fn new(len: usize, lengths: &[u32], device: &Device) -> candle_core::Result<Mask> {
        let rows = lengths.len();
        let mut shares = vec![0.0f32; rows * len];
        for (row, place) in lengths.iter().zip(shares.chunks_exact_mut(len)) {
            let real = *row as usize;
            assert!(real <= len, "a row fits its place");
            place[..real].fill(1.0 / real.max(1) as f32);
        }
        let floor = shares.iter().map(|share| if *share > 0.0 { 0.0 } else { MASKED }).collect();
        Ok(Mask {
            floor: Tensor::from_vec(floor, (rows, len), device)?,
            shares: Tensor::from_vec(shares, (rows, 1, len), device)?,
        })
    }
}
