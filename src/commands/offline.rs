//! `ferry offline`: how fast the executors alone could be on this traffic. The bound that `ferry load` is compared with.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::ValueEnum;
use ferry::config::Place;
use ferry::device::sim::SimDevice;
use ferry::executor::model::LoadedModel;
use ferry::gpu::driver::Driver;
use ferry::load::lengths::Lengths;
use ferry::load::offline::{self, OfflineReport, Options, Order};
use ferry::load::on_device;
use ferry::load::payload::{Common, Inputs};
use ferry::models::manifest::Precision;
use ferry::models::repository::{self, LoadOptions, Loaded};
use ferry::server::layout_of;
use ferry::vocab::Layout;
use indicatif::ProgressBar;

use super::{EXIT_FAILED, run_each_model_on_one_thread};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Model to run.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Directory of <name>/model.toml.
    #[arg(long, value_name = "DIR", default_value = "models")]
    models: PathBuf,
    /// fixed:64, uniform:8..128, lognormal:MEAN,SIGMA,MAX or file:F. Without it: all lengths the model allows.
    #[arg(long, value_name = "LENGTHS")]
    lengths: Option<String>,
    /// Requests, all there at once.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    requests: u32,
    /// Executor threads. Without it: as many as `ferry serve` would start.
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Without it: packed where the model can.
    #[arg(long, value_enum)]
    layout: Option<LayoutArg>,
    /// Of an encoder's products. Without it: what the manifest says.
    #[arg(long, value_enum)]
    precision: Option<PrecisionArg>,
    /// cpu, cuda:N, or sim:SEED.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// On a device: batches in flight at once.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    slots: u8,
    /// On a device: bytes of its memory for captured graphs; 0: none.
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    graph_bytes: usize,
    #[arg(long, value_enum, default_value_t = OrderArg::Sorted)]
    order: OrderArg,
    /// Most cells in a batch, padding included. Without it: the model's own limit.
    #[arg(long, value_name = "CELLS", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "batch_rows")]
    cells_max: Option<u64>,
    /// So many requests in each batch, whatever their lengths. Without it: as many as the model's limits allow.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch_rows: Option<u32>,
    /// Run all of it so many times, and report the median.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayoutArg {
    /// Rows × the longest of them, with a mask.
    Padded,
    /// All tokens end to end, no padding.
    Packed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PrecisionArg {
    F32,
    /// On a GPU.
    F16,
    /// On a GPU.
    Bf16,
    Int8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OrderArg {
    /// As the requests come.
    Arrival,
    /// By length: the least padding.
    Sorted,
}

pub fn run(args: &Args) -> ExitCode {
    if let Err(error) = run_each_model_on_one_thread() {
        eprintln!("cannot start again with RAYON_NUM_THREADS=1: {error}");
        return ExitCode::from(EXIT_FAILED);
    }
    match measure(args) {
        Ok(report) if args.json => {
            println!("{}", serde_json::to_string(&report).expect("plain data"));
            ExitCode::SUCCESS
        }
        Ok(report) => {
            print!("{}", text(&report));
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("ferry offline: {message}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn measure(args: &Args) -> Result<OfflineReport, String> {
    let precision = args.precision.map(|precision| match precision {
        PrecisionArg::F32 => Precision::F32,
        PrecisionArg::F16 => Precision::F16,
        PrecisionArg::Bf16 => Precision::BF16,
        PrecisionArg::Int8 => Precision::Int8,
    });
    let place = Place::parse(&args.device)
        .filter(|place| place.devices() == 1)
        .ok_or_else(|| format!("expected --device cpu, cuda:N or sim:SEED, got {}", args.device))?;
    let options = LoadOptions { precision, for_device: place != Place::Cpu, ..LoadOptions::default() };
    let loaded = repository::load(&args.models, &args.model, &options).map_err(|e| e.to_string())?;
    let entry = match loaded {
        Loaded::Model(entry) => entry,
        Loaded::Skipped(skipped) => return Err(format!("model {}: {}", skipped.name, skipped.reason)),
    };
    if args.precision.is_some() && entry.manifest.bert.is_none() {
        return Err(format!("model {} is no encoder; expected no --precision", args.model));
    }
    let contract = entry.model.contract();
    let layouts = entry.model.layouts();
    let layout = match args.layout {
        Some(LayoutArg::Padded) => Layout::Padded,
        Some(LayoutArg::Packed) if layouts.contains(&Layout::Packed) => Layout::Packed,
        Some(LayoutArg::Packed) => {
            return Err(format!("model {} has no packed layout; expected --layout padded", args.model));
        }
        None => layout_of(&entry.manifest, layouts),
    };
    let lengths = match (&args.lengths, &contract.length) {
        (Some(text), _) => Lengths::parse(text)?,
        (None, Some(length)) => Lengths::Uniform(length.min, length.max),
        (None, None) => Lengths::Fixed(1),
    };
    let requests = args.requests as usize;
    let inputs = Inputs::new(contract, lengths.sampler(args.seed).take(requests), 4096, args.seed, Common::default())?;
    let threads = args.threads.map_or_else(
        || ferry::config::Config::default_on(ferry::config::Machine::here()).threads.executors,
        usize::from,
    );
    let batching = &entry.manifest.batching;
    let options = Options {
        requests,
        threads,
        layout,
        order: match args.order {
            OrderArg::Arrival => Order::Arrival,
            OrderArg::Sorted => Order::Sorted,
        },
        rows_max: args.batch_rows.unwrap_or(batching.rows_max),
        cells_max: match args.batch_rows {
            Some(_) => u64::MAX,
            None => args.cells_max.unwrap_or(batching.padded_cells_max),
        },
        rounds: args.repeat as usize,
    };
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let on_device = OnDevice { args, model: &entry.model, inputs: &inputs, options: &options, progress: &progress };
    let report = match place {
        Place::Cpu => {
            let peak = entry.model.operations(1).map(|_| offline::gemm_gflops_peak());
            offline::run(&entry.model, &inputs, &options, peak, &progress).map_err(|error| error.to_string())
        }
        Place::Sim { seed, .. } => on_device.run(SimDevice::new(seed).driver()),
        Place::Cuda(numbers) => on_device.run_on_gpu(numbers[0]),
    };
    bar.finish_and_clear();
    report
}

struct OnDevice<'a> {
    args: &'a Args,
    model: &'a Arc<dyn LoadedModel>,
    inputs: &'a Inputs,
    options: &'a Options,
    progress: &'a (dyn Fn(usize, usize) + Sync),
}

impl OnDevice<'_> {
    fn run<D: Driver>(&self, driver: D) -> Result<OfflineReport, String> {
        let OnDevice { args, model, inputs, options, progress } = self;
        on_device::run(driver, model, inputs, options, args.slots.into(), args.graph_bytes, progress)
    }

    #[cfg(feature = "cuda")]
    fn run_on_gpu(&self, number: u16) -> Result<OfflineReport, String> {
        use ferry::device::cuda::{CudaDriver, Gpu};
        let gpu = Gpu::open(number).map_err(|fault| fault.to_string())?;
        self.run(CudaDriver::new(&gpu).map_err(|fault| fault.to_string())?)
    }

    #[cfg(not(feature = "cuda"))]
    fn run_on_gpu(&self, _number: u16) -> Result<OfflineReport, String> {
        Err("this binary was built without CUDA".to_owned())
    }
}
fn text(report: &OfflineReport) -> String {
    let mut text = format!(
        "{} requests to {} in {} batches on {} thread(s), {} layout: {:.2} s\n\
         {:.1} rows/s, {:.0} tokens/s, {:.1} rows in a batch, {:.1} % of the cells padding\n",
        report.requests,
        report.model,
        report.batches,
        report.threads,
        report.layout,
        report.duration_s,
        report.rows_per_s,
        report.tokens_per_s,
        report.batch_rows_mean,
        100.0 * report.padding_waste,
    );
    if let Some(device) = &report.device {
        text += &format!(
            "{}, {}: it computed for {:.3} s, the wall clock ran {:.3} times as long; {} slots, {} graphs\n\
             a lone request takes {:.0} µs\n",
            device.name,
            device.float,
            device.computed_s,
            device.wall_over_computed,
            device.slots,
            device.graphs,
            device.lone_p50_us,
        );
        if let Some(gflops) = device.gflops {
            text += &format!(
                "{gflops:.0} GFLOP/s for real tokens: {:.0} % of {:.0}, what a large product reaches there\n",
                100.0 * gflops / device.gemm_gflops_peak,
                device.gemm_gflops_peak,
            );
        }
        return text;
    }
    text += &format!("{:.0} tokens per second of CPU time", report.tokens_per_cpu_s);
    if let (Some(gflops), Some(peak)) = (report.gflops, report.gemm_gflops_peak) {
        let share = 100.0 * gflops / peak;
        text += &format!(
            ", {gflops:.1} GFLOP/s for real tokens: {share:.0} % of {peak:.1}, what a matrix product reaches here"
        );
    }
    text + "\n"
}
