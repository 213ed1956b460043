//! `ferry devices`: what models could run on here. Starts nothing.

use std::process::ExitCode;

use ferry::config::{Machine, Place};
use ferry::device::check;
use ferry::device::sim::{self, SimDevice};
use ferry::gpu::driver::{Driver, Fault};
use ferry::kernels;
use serde_json::json;

use super::{EXIT_CONFIG, EXIT_FAILED};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Print one JSON document; with --check, one line for each check.
    #[arg(long)]
    json: bool,
    /// Check kernels, graphs and slots on a device against plain references, and end with 1 if anything is wrong.
    #[arg(long)]
    check: bool,
    /// The device that is checked: cuda:0, or sim:SEED, which only shows that the checks run.
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0", requires = "check")]
    device: String,
    /// Little of everything: for compute-sanitizer.
    #[arg(long, requires = "check")]
    small: bool,
    /// At the end make the device fail, and see that it is told.
    #[arg(long, requires = "check")]
    lose: bool,
}

/// The processor.
struct Cpu {
    /// That this process may use.
    cores: usize,
    /// Instruction sets that the kernels are compiled for and this processor has, the best first: the one that is used.
    instruction_sets: Vec<String>,
    /// Whether 8-bit products have their own instruction.
    vnni: bool,
}

/// The GPUs, or why there are none.
struct Cuda {
    built: bool,
    /// The build had no compiler for kernels.
    kernels_missing: bool,
    gpus: Vec<Gpu>,
    problem: Option<String>,
    /// CUDA's libraries, and whether they can be loaded.
    libraries: Vec<(&'static str, bool)>,
}

struct Gpu {
    device: String,
    name: String,
    memory_bytes: u64,
    capability: String,
    multiprocessors: u32,
    driver_version: String,
}

pub fn run(args: &Args) -> ExitCode {
    if args.check {
        return match check_device(args) {
            Ok(0) => ExitCode::SUCCESS,
            Ok(failed) => {
                eprintln!("{failed} check(s) failed");
                ExitCode::from(EXIT_FAILED)
            }
            Err(message) => {
                eprintln!("ferry devices: {message}");
                ExitCode::from(EXIT_CONFIG)
            }
        };
    }
    let (cpu, cuda) = (cpu(), cuda());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&document(&cpu, &cuda)).expect("plain data"));
    } else {
        print!("{}", text(&cpu, &cuda));
    }
    ExitCode::SUCCESS
}

/// Runs the checks and prints each as it ends. Says how many failed.
fn check_device(args: &Args) -> Result<usize, String> {
    let options = check::Options { small: args.small, lose: args.lose };
    match Place::parse(&args.device) {
        Some(Place::Sim { seed, .. }) if !args.lose => {
            let device = SimDevice::new(seed);
            device.set_faults(sim::Faults { memory_max: 8 << 30, ..sim::Faults::default() });
            Ok(check_all(&|| Ok(device.driver()), options, args.json))
        }
        Some(Place::Cuda(numbers)) if numbers.len() == 1 => check_gpu(numbers[0], options, args.json),
        _ => Err(format!("expected --device cuda:N or sim:SEED (not with --lose), got {}", args.device)),
    }
}

#[cfg(feature = "cuda")]
fn check_gpu(number: u16, options: check::Options, json: bool) -> Result<usize, String> {
    use ferry::device::cuda::{CudaDriver, Gpu};
    let gpu = Gpu::open(number).map_err(|fault| fault.to_string())?;
    Ok(check_all(&|| CudaDriver::new(&gpu), options, json))
}

#[cfg(not(feature = "cuda"))]
fn check_gpu(_number: u16, _options: check::Options, _json: bool) -> Result<usize, String> {
    Err("this binary was built without CUDA".to_owned())
}

fn check_all<D: Driver>(make: &dyn Fn() -> Result<D, Fault>, options: check::Options, json: bool) -> usize {
    let mut failed = 0;
    check::run(make, options, &mut |outcome| {
        let (ok, found) = match &outcome.result {
            Ok(found) => (true, found),
            Err(why) => (false, why),
        };
        failed += usize::from(!ok);
        let seconds = outcome.took.as_secs_f64();
        if json {
            println!("{}", json!({ "check": outcome.name, "ok": ok, "found": found, "seconds": seconds }));
        } else {
            println!("{}  {:<56} {seconds:>7.2} s  {found}", if ok { "ok  " } else { "FAIL" }, outcome.name);
        }
    });
    failed
}

fn cpu() -> Cpu {
    let instruction_sets = kernels::archs().into_iter().map(|arch| set_name(&format!("{arch:?}")));
    Cpu { cores: Machine::here().cores, instruction_sets: instruction_sets.collect(), vnni: vnni() }
}

/// pulp's names mean little to others; one that is not known here is shown as it is.
fn set_name(arch: &str) -> String {
    let name = arch.split('(').next().unwrap_or(arch);
    let known = [("V4", "avx512"), ("V3", "avx2+fma"), ("Neon", "neon"), ("Scalar", "scalar")];
    known.iter().find(|(theirs, _)| *theirs == name).map_or(name, |(_, ours)| ours).to_owned()
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn vnni() -> bool {
    ferry::device::vnni::Vnni::try_new().is_some()
}

#[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
fn vnni() -> bool {
    false
}

#[cfg(feature = "cuda")]
fn cuda() -> Cuda {
    use ferry::device::cuda::{modules, probe};

    let version = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    let describe = |gpu: probe::GpuInfo| Gpu {
        device: format!("cuda:{}", gpu.ordinal),
        name: gpu.name,
        memory_bytes: gpu.memory_bytes,
        capability: version(gpu.capability),
        multiprocessors: gpu.multiprocessors,
        driver_version: version(gpu.driver_version),
    };
    let (gpus, problem) = match probe::probe() {
        Ok(gpus) => (gpus.into_iter().map(describe).collect(), None),
        Err(sentence) => (Vec::new(), Some(sentence)),
    };
    let libraries = probe::libraries().into_iter().map(|library| (library.name, library.found)).collect();
    Cuda { built: true, kernels_missing: modules::KERNELS_MISSING, gpus, problem, libraries }
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Cuda {
    let how = "built without CUDA: source the env of tools/cuda-toolkit, then cargo build --release --features cuda";
    Cuda { built: false, kernels_missing: true, gpus: Vec::new(), problem: Some(how.to_owned()), libraries: Vec::new() }
}

fn document(cpu: &Cpu, cuda: &Cuda) -> serde_json::Value {
    let gpus: Vec<serde_json::Value> = cuda
        .gpus
        .iter()
        .map(|gpu| {
            json!({
                "device": gpu.device,
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "capability": gpu.capability,
                "multiprocessors": gpu.multiprocessors,
                "driver_version": gpu.driver_version,
            })
        })
        .collect();
    let libraries: Vec<serde_json::Value> =
        cuda.libraries.iter().map(|(name, found)| json!({ "name": name, "found": found })).collect();
    json!({
        "cpu": { "cores": cpu.cores, "instruction_sets": cpu.instruction_sets, "vnni": cpu.vnni },
        "cuda": {
            "built": cuda.built,
            "kernels_missing": cuda.kernels_missing,
            "gpus": gpus,
            "problem": cuda.problem,
            "libraries": libraries,
        },
    })
}

fn text(cpu: &Cpu, cuda: &Cuda) -> String {
    let best = cpu.instruction_sets.first().map_or("scalar", String::as_str);
    let eight_bits = if cpu.vnni { ", 8-bit products by VNNI" } else { "" };
    let plural = if cpu.cores == 1 { "" } else { "s" };
    let mut text = format!("cpu     {} core{plural}, {best}{eight_bits}\n", cpu.cores);
    for gpu in &cuda.gpus {
        text += &format!(
            "{:<7} {}, {:.1} GiB, compute capability {}, {} multiprocessors, driver of CUDA {}\n",
            gpu.device,
            gpu.name,
            gpu.memory_bytes as f64 / f64::from(1 << 30),
            gpu.capability,
            gpu.multiprocessors,
            gpu.driver_version,
        );
    }
    if let Some(problem) = &cuda.problem {
        text += &format!("cuda    {problem}\n");
    }
    if cuda.built && cuda.kernels_missing {
        text += "cuda    this build has no kernels (FERRY_KERNELS=skip): it is for lints, and runs nothing on a GPU\n";
    }
    // A machine without a driver has one problem, not five.
    if !cuda.gpus.is_empty() {
        for (name, _) in cuda.libraries.iter().filter(|(_, found)| !found) {
            text += &format!("        {name} was not found: name its folder in LD_LIBRARY_PATH\n");
        }
    }
    text
}
