//! A small convolutional network that reads one handwritten digit of 8×8 pixels.
//!
//! The same layers in the same order as tools/train_digits.py, whose logits tests/models.rs compares with.
//!
//! Always true
//! - Pixels arrive raw, 0 to 16. The division by 16 is folded into the first layer's weights; 16 is a power of two, so
//!   that changes no bit of any product.

use std::sync::Arc;

use candle_core::{Device, Module, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Linear};

use super::weights::{Weights, WeightsError};
use crate::contract::{Contract, Dim};
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::vocab::DType;

const SIDE: usize = 8;
const PIXEL_MAX: f64 = 16.0;
const CHANNELS: [usize; 4] = [1, 16, 32, 32];
/// After the one pooling: 32 channels of 4×4.
const FEATURES: usize = CHANNELS[3] * (SIDE / 2) * (SIDE / 2);
const INNER: usize = 64;
const CLASSES: usize = 10;

struct Network {
    convs: [Conv2d; 3],
    fc1: Linear,
    fc2: Linear,
    device: Device,
}

impl Network {
    fn load(weights: &mut Weights, device: &Device) -> Result<Network, WeightsError> {
        let conv1 = load_conv(weights, 1, 1.0 / PIXEL_MAX)?;
        let conv2 = load_conv(weights, 2, 1.0)?;
        let conv3 = load_conv(weights, 3, 1.0)?;
        Ok(Network {
            convs: [conv1, conv2, conv3],
            fc1: load_linear(weights, "fc1", FEATURES, INNER)?,
            fc2: load_linear(weights, "fc2", INNER, CLASSES)?,
            device: device.clone(),
        })
    }

    /// `[rows, 8, 8]` raw pixels to `[rows, 10]` logits.
    ///
    /// Hot: once per batch.
    fn forward(&self, images: &[f32], rows: usize) -> candle_core::Result<Tensor> {
        let [conv1, conv2, conv3] = &self.convs;
        let x = Tensor::from_slice(images, (rows, 1, SIDE, SIDE), &self.device)?;
        let x = conv1.forward(&x)?.relu()?;
        let x = conv2.forward(&x)?.relu()?.max_pool2d(2)?;
        let x = conv3.forward(&x)?.relu()?.flatten_from(1)?;
        self.fc2.forward(&self.fc1.forward(&x)?.relu()?)
    }
}

fn load_conv(weights: &mut Weights, n: usize, scale: f64) -> Result<Conv2d, WeightsError> {
    let name = format!("conv{n}.weight");
    let weight = weights.take(&name, &[CHANNELS[n], CHANNELS[n - 1], 3, 3])?;
    let weight = (weight * scale).map_err(|error| weights.device_error(&name, error))?;
    let bias = weights.take(&format!("conv{n}.bias"), &[CHANNELS[n]])?;
    Ok(Conv2d::new(weight, Some(bias), Conv2dConfig { padding: 1, ..Default::default() }))
}

fn load_linear(weights: &mut Weights, name: &str, input: usize, output: usize) -> Result<Linear, WeightsError> {
    let weight = weights.take(&format!("{name}.weight"), &[output, input])?;
    Ok(Linear::new(weight, Some(weights.take(&format!("{name}.bias"), &[output])?)))
}

pub struct Digits {
    contract: Contract,
    network: Arc<Network>,
    weight_bytes: u64,
}

impl Digits {
    pub fn load(contract: Contract, weights: &mut Weights, device: &Device) -> Result<Digits, WeightsError> {
        let network = Arc::new(Network::load(weights, device)?);
        Ok(Digits { contract, network, weight_bytes: weights.taken_bytes() })
    }
}

/// What the architecture asks of a contract.
pub fn check(contract: &Contract) -> Result<(), String> {
    let image = [Dim::Fixed(SIDE as u32), Dim::Fixed(SIDE as u32)];
    match (&contract.inputs[..], &contract.outputs[..]) {
        ([input], [output])
            if input.dtype == DType::F32
                && input.shape == image
                && output.dtype == DType::F32
                && output.shape == [Dim::Fixed(CLASSES as u32)] =>
        {
            Ok(())
        }
        _ => Err(format!(
            "expected one input of dtype f32 and shape [{SIDE}, {SIDE}], and one output of dtype f32 and shape [{CLASSES}]"
        )),
    }
}

impl LoadedModel for Digits {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        Ok(Box::new(Instance(self.network.clone())))
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }
}

struct Instance(Arc<Network>);

impl Model for Instance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        let logits = self.0.forward(batch.input::<f32>(0), batch.rows as usize)?;
        super::write_f32(&logits, out.output_mut(0))
    }
}
