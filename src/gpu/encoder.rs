//! An encoder of the BERT family on a device: parameters, the memory of its activations, and a forward pass as launches.
//!
//! Rows lie end to end and padding never exists: each token is a row of every product, and attention looks up in the table where
//! its sequence begins and ends.
//!
//! Always true
//! - Parameters are on a device once; its executors share them, and nobody writes them after they were put there.
//! - A batch allocates nothing. Counts come from the table, so a captured graph serves every batch of at most its size.
//!
//! Elsewhere: the same encoder on a CPU (src/kernels/encoder.rs), with candle's operations (src/models/bert/reference.rs).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::driver::{Driver, Fault, HostUse, Product};
use super::launch::{Float, Memory, Span, Table};
use super::ops::{AddNorm, Attention, BiasAct, Bounds, DenseRows, EmbedNorm, PoolRows};
use super::reference;
pub use super::reference::{Activation, Pool};
use super::slot::Buffers;

/// `y = W·x + b`
#[derive(Clone, Debug, Default)]
pub struct Dense<V> {
    /// `[outputs][inputs]`
    pub weight: V,
    pub bias: V,
}

#[derive(Clone, Debug, Default)]
pub struct Norm<V> {
    pub weight: V,
    pub shift: V,
}

#[derive(Clone, Debug)]
pub struct Layer<V> {
    /// Query, key and value in one product.
    pub qkv: Dense<V>,
    pub attention_out: Dense<V>,
    pub attention_norm: Norm<V>,
    pub inner: Dense<V>,
    pub out: Dense<V>,
    pub norm: Norm<V>,
}

/// Everything that was learned: as f32 on the host, or on a device.
#[derive(Clone, Debug)]
pub struct Parameters<V> {
    /// `[vocab][hidden]`
    pub words: V,
    /// `[positions][hidden]`, with the embedding of segment 0 added.
    pub places: V,
    /// `[segments][hidden]` less that of segment 0, where callers say segments.
    pub segments: Option<V>,
    pub norm: Norm<V>,
    pub layers: Vec<Layer<V>>,
    /// Products on what was pooled, in f32: a classifier has one or two.
    pub head: Vec<(Dense<V>, Activation)>,
}

/// An encoder's sizes, and what it does between its products.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    pub hidden: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub activation: Activation,
    pub pooling: Pool,
    /// To length 1.
    pub normalize: bool,
    pub eps: f32,
    /// Of activations and of the weights of all products but the head's.
    pub float: Float,
    /// Outputs of each product of the head.
    pub head: Vec<usize>,
}

impl Form {
    /// Values in an answer.
    pub fn outputs(&self) -> usize {
        self.head.last().copied().unwrap_or(self.hidden)
    }

    /// The kernels have this shape. Says what they would need otherwise.
    pub fn check(&self) -> Result<(), String> {
        let size = self.hidden / self.heads.max(1);
        match (self.hidden % 4, size) {
            (0, 32 | 64 | 128) if size * self.heads == self.hidden => Ok(()),
            _ => Err(format!(
                "expected heads of 32, 64 or 128 and a multiple of 4 features, got {} heads of {} features",
                self.heads, self.hidden
            )),
        }
    }

    /// Bytes of each of the activations, in the order of [`Arena`].
    fn arena(&self, rows: usize, tokens: usize) -> [usize; 7] {
        let (t, h) = (tokens * self.float.bytes(), self.hidden);
        let pooled = rows * self.head.iter().copied().max().unwrap_or(0).max(h) * size_of::<f32>();
        [t * h, t * 3 * h, t * h, t * h, t * self.intermediate, pooled, pooled]
    }
}

/// Puts parameters on a device. Returns when they are there.
pub fn put<D: Driver>(
    driver: &mut D,
    form: &Form,
    host: &Parameters<Vec<f32>>,
) -> Result<Parameters<D::Memory>, Fault> {
    let (t, mut to) = (form.float, Device(driver));
    let mut layers = Vec::with_capacity(host.layers.len());
    for layer in &host.layers {
        layers.push(Layer {
            qkv: to.dense(t, &layer.qkv)?,
            attention_out: to.dense(t, &layer.attention_out)?,
            attention_norm: to.norm(&layer.attention_norm)?,
            inner: to.dense(t, &layer.inner)?,
            out: to.dense(t, &layer.out)?,
            norm: to.norm(&layer.norm)?,
        });
    }
    let mut head = Vec::with_capacity(host.head.len());
    for (product, then) in &host.head {
        head.push((to.dense(Float::F32, product)?, *then));
    }
    Ok(Parameters {
        words: to.floats(t, &host.words)?,
        places: to.floats(t, &host.places)?,
        segments: host.segments.as_ref().map(|segments| to.floats(t, segments)).transpose()?,
        norm: to.norm(&host.norm)?,
        layers,
        head,
    })
}

struct Device<'a, D>(&'a mut D);

impl<D: Driver> Device<'_, D> {
    /// One tensor, through host memory of its own: at start, and never again.
    fn floats(&mut self, float: Float, values: &[f32]) -> Result<D::Memory, Fault> {
        let bytes = reference::encode(float, values);
        let memory = self.0.allocate(bytes.len().max(1))?;
        let mut host = self.0.host_memory(bytes.len().max(1), HostUse::Upload)?;
        bytemuck::cast_slice_mut::<u64, u8>(host.words_mut())[..bytes.len()].copy_from_slice(&bytes);
        self.0.upload(&*host, 0, Span::of(&memory).part(0, bytes.len()))?;
        // The host memory is freed after this, and other queues may read.
        self.0.synchronize()?;
        Ok(memory)
    }

    fn dense(&mut self, float: Float, dense: &Dense<Vec<f32>>) -> Result<Dense<D::Memory>, Fault> {
        Ok(Dense { weight: self.floats(float, &dense.weight)?, bias: self.floats(float, &dense.bias)? })
    }

    /// What a norm multiplies by and adds stays f32: it is little, and used once for each value.
    fn norm(&mut self, norm: &Norm<Vec<f32>>) -> Result<Norm<D::Memory>, Fault> {
        Ok(Norm { weight: self.floats(Float::F32, &norm.weight)?, shift: self.floats(Float::F32, &norm.shift)? })
    }
}

/// Activations of one executor. Its batches are computed one after the other, so one set serves all of its slots.
struct Arena<M> {
    x: M,
    qkv: M,
    context: M,
    y: M,
    inner: M,
    pooled: M,
    headed: M,
}

/// An encoder of one executor.
pub struct Encoder<D: Driver> {
    form: Form,
    parameters: Arc<Parameters<D::Memory>>,
    arena: Arena<D::Memory>,
    /// Largest batch.
    bounds: Bounds,
    /// By slot and [`bucket`] of tokens.
    graphs: BTreeMap<(usize, usize), D::Graph>,
}

/// Batches of at most so many tokens are run from a captured graph, where there is one for their size. Larger ones take the
/// device longer than the host takes to ask for them.
pub const GRAPH_TOKENS_MAX: usize = 4096;

/// The size of the graph that serves a batch of `tokens`. Up to 128 more than the batch has: products are computed in tiles of
/// 64 or 128 rows anyway.
pub fn bucket(tokens: usize) -> usize {
    let step = match tokens {
        0..=128 => 16,
        129..=512 => 64,
        _ => 128,
    };
    tokens.max(1).next_multiple_of(step)
}

/// All of them, up to `tokens`.
pub fn buckets(tokens: usize) -> Vec<usize> {
    let mut all = vec![];
    let mut at = bucket(1);
    while at <= bucket(tokens.min(GRAPH_TOKENS_MAX)) {
        all.push(at);
        at = bucket(at + 1);
    }
    all
}

impl<D: Driver> Encoder<D> {
    /// Allocates activations for batches of at most `bounds`.
    pub fn new(
        driver: &D,
        form: Form,
        parameters: Arc<Parameters<D::Memory>>,
        bounds: Bounds,
    ) -> Result<Encoder<D>, Fault> {
        // Products are computed, and graphs captured, for whole buckets.
        let tokens = bucket(bounds.tokens);
        let [x, qkv, context, y, inner, pooled, headed] = form.arena(bounds.rows, tokens);
        let take = |bytes: usize| driver.allocate(bytes.max(1));
        let arena = Arena {
            x: take(x)?,
            qkv: take(qkv)?,
            context: take(context)?,
            y: take(y)?,
            inner: take(inner)?,
            pooled: take(pooled)?,
            headed: take(headed)?,
        };
        Ok(Encoder { form, parameters, arena, bounds, graphs: BTreeMap::new() })
    }

    pub fn form(&self) -> &Form {
        &self.form
    }

    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Captured graphs.
    pub fn graphs(&self) -> usize {
        self.graphs.len()
    }

    /// Asks for the forward pass of a batch whose ids (and segments) are in the slot: through a graph, where one was captured.
    pub fn compute(&self, driver: &mut D, buffers: &Buffers<D>, batch: Bounds) -> Result<(), Fault> {
        match self.graphs.get(&(buffers.index, bucket(batch.tokens))) {
            Some(graph) => driver.replay(graph),
            None => self.ask(driver, buffers, batch),
        }
    }

    /// The same without a graph.
    pub fn ask(&self, driver: &mut D, buffers: &Buffers<D>, batch: Bounds) -> Result<(), Fault> {
        let Encoder { form, arena, parameters, .. } = self;
        let Bounds { rows, longest, .. } = batch;
        // What is computed beyond the last token is nobody's; there are fewer sizes to plan for.
        let tokens = bucket(batch.tokens);
        assert!(rows <= self.bounds.rows && tokens <= bucket(self.bounds.tokens), "{batch:?} within {:?}", self.bounds);
        assert!(longest <= self.bounds.longest, "{batch:?} within {:?}", self.bounds);
        let (h, float, eps) = (form.hidden, form.float, form.eps);
        let table = Span::of(&buffers.table);
        let segments = parameters.segments.as_ref().map(Span::of);
        let said = segments.is_some().then(|| Span::of(&buffers.inputs[1]));
        let (x, y) = (Span::of(&arena.x), Span::of(&arena.y));
        let embed = EmbedNorm {
            table,
            ids: Span::of(&buffers.inputs[0]),
            segments: said,
            words: Span::of(&parameters.words),
            places: Span::of(&parameters.places),
            segment_rows: segments,
            weight: Span::of(&parameters.norm.weight),
            shift: Span::of(&parameters.norm.shift),
            out: x,
            hidden: h,
            eps,
        };
        driver.launch(&embed.launch(&batch, float))?;
        let size = h / form.heads;
        let scale = 1.0 / (size as f32).sqrt();
        let product = |driver: &mut D, x, dense: &'_ Dense<D::Memory>, bias: bool, y, sizes: [usize; 2]| {
            let weights = Span::of(&dense.weight);
            let bias = bias.then(|| Span::of(&dense.bias));
            let [inputs, outputs] = sizes;
            driver.product(&Product { x, weights, bias, y, tokens, inputs, outputs, float })
        };
        for layer in &parameters.layers {
            let (qkv, context, inner) = (Span::of(&arena.qkv), Span::of(&arena.context), Span::of(&arena.inner));
            product(driver, x, &layer.qkv, true, qkv, [h, 3 * h])?;
            let attention = Attention { table, qkv, context, heads: form.heads, size, scale };
            driver.launch(&attention.launch(&batch, float))?;
            // Its bias is added with the residual, in one pass.
            product(driver, context, &layer.attention_out, false, y, [h, h])?;
            self.add_norm(driver, batch, table, &layer.attention_out.bias, &layer.attention_norm)?;
            product(driver, x, &layer.inner, false, inner, [h, form.intermediate])?;
            let (bias, width) = (Some(Span::of(&layer.inner.bias)), form.intermediate);
            let act = BiasAct { table, x: inner, bias, width, activation: form.activation };
            driver.launch(&act.launch(&batch, float))?;
            product(driver, inner, &layer.out, false, y, [form.intermediate, h])?;
            self.add_norm(driver, batch, table, &layer.out.bias, &layer.norm)?;
        }
        self.answer(driver, buffers, batch)
    }

    fn add_norm(
        &self,
        driver: &mut D,
        batch: Bounds,
        table: Span<'_, D::Memory>,
        bias: &D::Memory,
        norm: &Norm<D::Memory>,
    ) -> Result<(), Fault> {
        let Form { float, hidden, eps, .. } = self.form;
        let add = AddNorm {
            table,
            x: Span::of(&self.arena.x),
            y: Span::of(&self.arena.y),
            bias: Some(Span::of(bias)),
            weight: Span::of(&norm.weight),
            shift: Span::of(&norm.shift),
            hidden,
            eps,
        };
        driver.launch(&add.launch(&batch, float))
    }

    /// Pools, and runs the head.
    fn answer(&self, driver: &mut D, buffers: &Buffers<D>, batch: Bounds) -> Result<(), Fault> {
        let Encoder { form, arena, parameters, .. } = self;
        let (hidden, table) = (form.hidden, Span::of(&buffers.table));
        let out = Span::of(&buffers.outputs[0]);
        let (mut from, mut to) = (Span::of(&arena.pooled), Span::of(&arena.headed));
        let pooled = if parameters.head.is_empty() { out } else { from };
        let x = Span::of(&arena.x);
        let pool = PoolRows { table, x, out: pooled, hidden, mode: form.pooling, normalize: form.normalize };
        driver.launch(&pool.launch(&batch, form.float))?;
        let mut inputs = hidden;
        for (at, (dense, activation)) in parameters.head.iter().enumerate() {
            let outputs = form.head[at];
            let y = if at + 1 == parameters.head.len() { out } else { to };
            let (w, bias) = (Span::of(&dense.weight), Some(Span::of(&dense.bias)));
            let dense = DenseRows { table, x: from, w, bias, y, inputs, outputs, activation: *activation };
            driver.launch(&dense.launch(&batch))?;
            std::mem::swap(&mut from, &mut to);
            inputs = outputs;
        }
        Ok(())
    }

    /// Bytes of its activations.
    pub fn arena_bytes(&self) -> usize {
        let Arena { x, qkv, context, y, inner, pooled, headed } = &self.arena;
        [x, qkv, context, y, inner, pooled, headed].into_iter().map(Memory::bytes).sum()
    }

    /// Captures the forward pass for a slot and every bucket of up to `tokens`, as long as the device keeps `budget_bytes` more
    /// than that free, and until one does not capture. Says how many there are now.
    pub fn capture(
        &mut self,
        driver: &mut D,
        buffers: &Buffers<D>,
        tokens: usize,
        budget_bytes: usize,
    ) -> Result<usize, Fault> {
        put_one_token(driver, buffers)?;
        let (free_before, _) = driver.memory_info()?;
        for (at, bucket) in buckets(tokens.min(self.bounds.tokens)).into_iter().enumerate() {
            let (free, _) = driver.memory_info()?;
            if free_before.saturating_sub(free) > budget_bytes {
                tracing::warn!(bucket, budget_bytes, "graphs have used up their memory; larger batches are launched");
                break;
            }
            let batch =
                Bounds { rows: self.bounds.rows.min(bucket), tokens: bucket, longest: self.bounds.longest.min(bucket) };
            // Code is loaded at its first use, which must not be in a capture. A simulated device loads none, and is slow.
            if at == 0 || !driver.is_simulated() {
                self.ask(driver, buffers, batch)?;
                driver.synchronize()?;
            }
            match driver.capture(&mut |driver| self.ask(driver, buffers, batch))? {
                Some(graph) => drop(self.graphs.insert((buffers.index, bucket), graph)),
                None => break,
            }
        }
        Ok(self.graphs.len())
    }
}

/// Makes the slot hold a batch that can be computed: one row of the token 0.
fn put_one_token<D: Driver>(driver: &mut D, buffers: &Buffers<D>) -> Result<(), Fault> {
    let all = buffers.inputs.iter().chain([&buffers.table]);
    let mut host = driver.host_memory(all.map(Memory::bytes).max().unwrap_or(0), HostUse::Upload)?;
    for memory in &buffers.inputs {
        driver.upload(&*host, 0, Span::of(memory))?;
    }
    driver.synchronize()?;
    let table: &mut [i32] = bytemuck::cast_slice_mut(host.words_mut());
    Table::write(&[1], &mut table[..Table::len(1)]);
    driver.upload(&*host, 0, Span::of(&buffers.table))?;
    driver.synchronize()
}
