//! Executors: what each is made of, on its own thread, and warmed with; and what the warm-up said of batch sizes.
//!
//! Always true
//! - An executor's worker is made on the thread that runs it, which touches its memory first.
//! - The server has all executors warm, or it has not started.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Event, ExecutorThreads, Plan, StartError, layout_of, spawn_replaceable, spawn_thread};
use crate::batcher::{ExecutorLink, OnHang};
use crate::config::Place;
use crate::control::lifecycle::Lifecycle;
use crate::device::sim::{self, SimDevice};
use crate::executor::cpu::CpuExecutor;
use crate::executor::device::{self, Program};
use crate::executor::fence::{Fence, Pass};
use crate::executor::model::LoadedModel;
use crate::executor::slot::{FilledSlot, VacantSlot};
use crate::executor::worker::{Answers, Left, Worker};
use crate::gpu::driver::Driver;
#[cfg(feature = "cuda")]
use crate::gpu::driver::Fault;
use crate::mail::ToBatcher;
use crate::mailbox::{Receiver, Sender, mailbox};
use crate::models::repository::ModelEntry;
use crate::scheduler::{Group, SeatSpec, cost};
use crate::vocab::{Layout, ModelHandle};

/// Starts the executor threads and the inline worker; returns when all of them are warm.
pub(super) fn start_executors(
    plan: &Plan<'_>,
    lifecycle: &Arc<Lifecycle>,
    threads: &ExecutorThreads,
    others: &mut Vec<JoinHandle<()>>,
) -> Result<Started, StartError> {
    let mut started = match &plan.config.executor.device {
        Place::Cpu => start_on_cpu(plan, threads)?,
        Place::Sim { seed, lost_after } => {
            let device = plan.sim.clone().unwrap_or_else(|| SimDevice::new(*seed));
            if lost_after.is_some() {
                device.set_faults(sim::Faults { operation: *lost_after, ..sim::Faults::default() });
            }
            let drivers = (0..plan.config.threads.executors).map(|_| (device.driver(), 0)).collect();
            start_on_devices(plan, lifecycle, drivers, others)?
        }
        Place::Cuda(numbers) => start_on_gpus(plan, lifecycle, numbers, others)?,
    };
    if plan.groups.contains(&Group::Inline) {
        let index = started.links.len();
        let (worker, warmed) = worker_maker(plan, index, Group::Inline)(WarmUp::Yes)?;
        started.warmed.extend(warmed);
        plan.telemetry.executor(index).set_inline();
        started.links.push(ExecutorLink::Inline(Box::new(worker)));
        started.seats.push(SeatSpec { group: Group::Inline, slots: 1, device: 0 });
    }
    Ok(started)
}

fn start_on_cpu(plan: &Plan<'_>, threads: &ExecutorThreads) -> Result<Started, StartError> {
    let slots = plan.config.executor.slots;
    let mut started = Started::default();
    let (warm_sender, warm) = flume::unbounded();
    let replacements = Arc::new(AtomicU32::new(0));
    for index in 0..plan.config.threads.executors {
        let (sender, receiver) = mailbox(slots as usize);
        let fence = Arc::new(Fence::default());
        let seat = CpuSeat {
            index,
            make: Arc::new(worker_maker(plan, index, Group::Executors)),
            slots: Arc::new(receiver),
            batcher: plan.batcher.clone(),
            spin: plan.config.frontend.spin,
            events: plan.events.clone(),
            threads: Arc::clone(threads),
        };
        let warm = warm_sender.clone();
        seat.start(fence.pass(), WarmUp::Yes, move |made| {
            drop(warm.send(made.map(|warmed| Warm { warmed, ..Warm::default() })))
        })?;
        let (replacements, max) = (Arc::clone(&replacements), plan.config.executor.replacements_max);
        let replace = move |pass| seat.replace(pass, &replacements, max);
        started.links.push(ExecutorLink::Thread(sender, OnHang::Replace(fence, Box::new(replace))));
        started.seats.push(SeatSpec { group: Group::Executors, slots, device: index as u16 });
    }
    drop(warm_sender);
    started.take_warm(&warm, plan.config.threads.executors)?;
    Ok(started)
}

type MakeWorker = dyn Fn(WarmUp) -> Result<(Worker, Vec<Warmed>), StartError> + Send + Sync;

/// Whether a worker runs some batches for nobody before its first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WarmUp {
    Yes,
    /// Somebody waits for it already.
    No,
}

/// What a thread needs to run the batches of one executor, and the next thread, if that one hangs.
struct CpuSeat {
    index: usize,
    make: Arc<MakeWorker>,
    slots: Arc<Receiver<FilledSlot>>,
    batcher: Sender<ToBatcher>,
    spin: Duration,
    events: flume::Sender<Event>,
    threads: ExecutorThreads,
}

impl CpuSeat {
    /// Starts a thread with this pass. `made` is told on it whether there is a worker.
    fn start(
        &self,
        pass: Pass,
        warm_up: WarmUp,
        made: impl FnOnce(Result<Vec<Warmed>, StartError>) + Send + 'static,
    ) -> Result<(), StartError> {
        let (make, slots, batcher) = (Arc::clone(&self.make), Arc::clone(&self.slots), self.batcher.clone());
        let (spin, mine) = (self.spin, pass.clone());
        let thread =
            spawn_replaceable(format!("ferry-exec-{}", self.index), &self.events, move || match make(warm_up) {
                Ok((mut worker, warmed)) => {
                    worker.hold(mine);
                    made(Ok(warmed));
                    worker.run_thread(&slots, &batcher, spin)
                }
                Err(error) => {
                    made(Err(error));
                    Left::Closed
                }
            })?;
        let mut threads = self.threads.lock().expect("nothing that can panic is done with it");
        threads.retain(|(_, pass)| pass.is_valid());
        threads.push((thread, pass));
        Ok(())
    }

    /// Starts another thread in the place of one that hangs. False where there may be no more: the server is told to end.
    fn replace(&self, pass: Pass, replacements: &AtomicU32, max: u32) -> bool {
        let index = self.index;
        let hung = |why: String| {
            let _ = self.events.send(Event::Hung(format!("executor {index} hangs, and {why}")));
            false
        };
        if replacements.fetch_add(1, Ordering::Relaxed) >= max {
            return hung(format!("{max} threads were replaced before (executor.replacements_max)"));
        }
        let events = self.events.clone();
        let made = move |made: Result<Vec<Warmed>, StartError>| {
            if let Err(error) = made {
                let _ = events.send(Event::Hung(format!("executor {index} hung, and no other can be made: {error}")));
            }
        };
        match self.start(pass, WarmUp::No, made) {
            Ok(()) => true,
            Err(error) => hung(error.to_string()),
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn start_on_gpus(
    _plan: &Plan<'_>,
    _lifecycle: &Arc<Lifecycle>,
    _numbers: &[u16],
    _others: &mut Vec<JoinHandle<()>>,
) -> Result<Started, StartError> {
    Err(StartError::Device(
        "executor.device: this binary was built without CUDA; build it with `--features cuda` (see README.md), or take \
         cpu"
        .into(),
    ))
}

#[cfg(feature = "cuda")]
fn start_on_gpus(
    plan: &Plan<'_>,
    lifecycle: &Arc<Lifecycle>,
    numbers: &[u16],
    others: &mut Vec<JoinHandle<()>>,
) -> Result<Started, StartError> {
    use crate::device::cuda::{CudaDriver, Gpu};
    let failed = |error: Fault| StartError::Device(format!("executor.device: {error}"));
    let gpus: Vec<Gpu> = numbers.iter().map(|number| Gpu::open(*number)).collect::<Result<_, _>>().map_err(failed)?;
    let mut drivers = Vec::new();
    for index in 0..plan.config.threads.executors {
        let at = index % gpus.len();
        drivers.push((CudaDriver::new(&gpus[at]).map_err(failed)?, numbers[at]));
    }
    start_on_devices(plan, lifecycle, drivers, others)
}

/// Starts an executor for each driver, with the number of its device: two threads each, one that asks and one that waits.
fn start_on_devices<D: Driver>(
    plan: &Plan<'_>,
    lifecycle: &Arc<Lifecycle>,
    drivers: Vec<(D, u16)>,
    others: &mut Vec<JoinHandle<()>>,
) -> Result<Started, StartError> {
    let slots = plan.config.executor.slots;
    let spin = plan.config.frontend.spin;
    let host: Vec<Option<Program<Vec<f32>>>> = (plan.models.iter().zip(&plan.groups))
        .map(|(model, group)| model.model.program().filter(|_| *group == Group::Executors))
        .collect();
    let on_device: Vec<bool> = host.iter().map(Option::is_some).collect();
    let mut put: BTreeMap<u16, Vec<Option<Program<D::Memory>>>> = BTreeMap::new();
    let mut started = Started::default();
    let (warm_sender, warm) = flume::unbounded();
    let count = drivers.len();
    for (index, (mut driver, number)) in drivers.into_iter().enumerate() {
        tracing::info!(executor = index, device = driver.name(), "batches of encoders run on a device");
        let programs = match put.get(&number) {
            Some(programs) => programs.clone(),
            None => {
                let programs =
                    device::put(&mut driver, &host).map_err(|fault| StartError::Device(fault.to_string()))?;
                put.insert(number, programs.clone());
                programs
            }
        };
        let (sender, receiver) = mailbox(slots as usize);
        let timeout = plan.config.executor.hang_timeout;
        let give_up: Box<dyn FnMut() + Send> = {
            let (lifecycle, events) = (Arc::clone(lifecycle), plan.events.clone());
            Box::new(move || {
                lifecycle.set_draining();
                let message = format!("executor {index}: a batch has run for more than {timeout:?} on its device");
                let _ = events.send(Event::DeviceLost(message));
            })
        };
        started.links.push(ExecutorLink::Thread(sender, OnHang::GiveUp(give_up)));
        started.seats.push(SeatSpec { group: Group::Executors, slots, device: number });
        let mine: Vec<bool> =
            (plan.groups.iter().zip(&on_device)).map(|(group, on)| *group == Group::Executors && !on).collect();
        let make_others = worker_maker_of(plan, index, mine);
        let answers = answers_of(plan, index);
        let options =
            device::Options { slots: slots as usize, graph_bytes_max: plan.config.executor.graph_bytes_max as usize };
        let warm_ups: Vec<(ModelHandle, Vec<(u32, u32)>)> = (plan.models.iter().enumerate())
            .filter(|(at, _)| on_device[*at])
            .map(|(at, model)| (ModelHandle(at as u16), model.manifest.warmup.shapes.clone()))
            .collect();
        let (batcher, warm, events) = (plan.batcher.clone(), warm_sender.clone(), plan.events.clone());
        let canary_every = plan.config.executor.canary_every;
        let repeatable: Vec<bool> = plan.models.iter().map(|model| model.model.can_repeat()).collect();
        let alarm: device::Alarm = {
            let (lifecycle, events) = (Arc::clone(lifecycle), plan.events.clone());
            Arc::new(move |fault| {
                // Before anything else: whoever balances load must not send more here.
                lifecycle.set_draining();
                let _ = events.send(Event::DeviceLost(fault.to_string()));
            })
        };
        others.push(spawn_thread(format!("ferry-exec-{index}"), &plan.events, move || {
            let make = || -> Result<_, StartError> {
                let (worker, mut warmed) = make_others(WarmUp::Yes)?;
                let contracts = answers.contracts.clone();
                let mailbox = batcher.clone();
                let mut made = device::make(driver, programs, worker, answers, options, mailbox, alarm)
                    .map_err(|fault| StartError::Device(format!("executor {index}: {fault}")))?;
                made.worker.watch(canary_every, repeatable);
                for (model, shapes) in warm_ups {
                    let times = made.worker.warm(model, Layout::Packed, &shapes).map_err(|refusal| {
                        StartError::WarmUp { model: contracts[model.index()].name.clone(), refusal }
                    })?;
                    warmed.extend(Warmed::all(index, model, &shapes, times));
                }
                Ok((made, warmed))
            };
            match make() {
                Ok((made, warmed)) => {
                    let completion = made.completion;
                    let waiting = spawn_thread(format!("ferry-wait-{index}"), &events, || completion.run_thread());
                    match waiting {
                        Ok(waiting) => {
                            let _ = warm.send(Ok(Warm { executor: index, warmed, slots: made.slots }));
                            drop(warm);
                            made.worker.run_thread(receiver, batcher, spin);
                            // It ends when the worker is gone, after the last batch in flight.
                            let _ = waiting.join();
                        }
                        Err(error) => drop(warm.send(Err(error))),
                    }
                }
                Err(error) => drop(warm.send(Err(error))),
            }
        })?);
    }
    drop(warm_sender);
    started.take_warm(&warm, count)?;
    Ok(started)
}

/// Executors that are warm.
#[derive(Default)]
pub(super) struct Started {
    pub links: Vec<ExecutorLink>,
    pub seats: Vec<SeatSpec>,
    pub warmed: Vec<Warmed>,
    /// Slots of an executor that are not the batcher's own.
    pub slots: Vec<(usize, Vec<VacantSlot>)>,
}

/// What an executor says when it is warm.
#[derive(Default)]
struct Warm {
    executor: usize,
    warmed: Vec<Warmed>,
    /// Empty: the batcher's own will do.
    slots: Vec<VacantSlot>,
}

impl Started {
    fn take_warm(
        &mut self,
        warm: &flume::Receiver<Result<Warm, StartError>>,
        executors: usize,
    ) -> Result<(), StartError> {
        for _ in 0..executors {
            let Ok(said) = warm.recv() else {
                return Err(StartError::Thread("an executor ended while it was warmed".into()));
            };
            let Warm { executor, warmed, slots } = said?;
            self.warmed.extend(warmed);
            if !slots.is_empty() {
                self.slots.push((executor, slots));
            }
        }
        Ok(())
    }
}

/// A batch that was run for warming up: its shape, and how long it took.
pub(super) struct Warmed {
    executor: usize,
    pub model: ModelHandle,
    pub rows: u32,
    pub padded_len: u32,
    pub took: Duration,
}

impl Warmed {
    fn all(
        executor: usize,
        model: ModelHandle,
        shapes: &[(u32, u32)],
        times: Vec<Duration>,
    ) -> impl Iterator<Item = Warmed> {
        shapes.iter().zip(times).map(move |((rows, padded_len), took)| Warmed {
            executor,
            model,
            rows: *rows,
            padded_len: *padded_len,
            took,
        })
    }
}

fn answers_of(plan: &Plan<'_>, index: usize) -> Answers {
    let (contracts, shards) = (plan.contracts.clone(), plan.shards.clone());
    Answers { index, contracts, shards, telemetry: Arc::clone(&plan.telemetry) }
}

/// [`worker_maker_of`] all models of a group.
fn worker_maker(
    plan: &Plan<'_>,
    index: usize,
    group: Group,
) -> impl Fn(WarmUp) -> Result<(Worker, Vec<Warmed>), StartError> + Send + Sync + 'static {
    worker_maker_of(plan, index, plan.groups.iter().map(|of_model| *of_model == group).collect())
}

/// What makes and warms an executor's worker for the models that are `mine`, on the thread that will run it: its memory is
/// touched there first.
fn worker_maker_of(
    plan: &Plan<'_>,
    index: usize,
    mine: Vec<bool>,
) -> impl Fn(WarmUp) -> Result<(Worker, Vec<Warmed>), StartError> + Send + Sync + 'static {
    let loaded: Vec<Arc<dyn LoadedModel>> = plan.models.iter().map(|model| Arc::clone(&model.model)).collect();
    let shapes: Vec<Vec<(u32, u32)>> = plan.models.iter().map(|model| model.manifest.warmup.shapes.clone()).collect();
    let layouts: Vec<Layout> =
        plan.models.iter().map(|model| layout_of(&model.manifest, model.model.layouts())).collect();
    // A model on the batcher's own thread is there because it takes no time; nobody should wait for its check.
    let repeatable: Vec<bool> = (plan.models.iter().zip(&plan.groups))
        .map(|(model, group)| *group == Group::Executors && model.model.can_repeat())
        .collect();
    let canary_every = plan.config.executor.canary_every;
    let answers = answers_of(plan, index);
    // Half the time after which it would be hung: a part that has begun then has as long again.
    let isolation_max = plan.config.executor.hang_timeout / 2;
    move |warm_up| {
        let executor = CpuExecutor::new(loaded.clone(), &mine)
            .map_err(|error| StartError::Thread(format!("executor {index}: {error}")))?;
        let mut warmed = Vec::new();
        let contracts = answers.contracts.clone();
        let mut worker = Worker::new(answers.clone(), Box::new(executor));
        worker.watch(canary_every, repeatable.clone());
        worker.isolate_for(isolation_max);
        for (at, contract) in contracts.iter().enumerate() {
            if mine[at] && warm_up == WarmUp::Yes {
                let model = ModelHandle(at as u16);
                let times = worker
                    .warm(model, layouts[at], &shapes[at])
                    .map_err(|refusal| StartError::WarmUp { model: contract.name.clone(), refusal })?;
                warmed.extend(Warmed::all(index, model, &shapes[at], times));
            }
        }
        Ok((worker, warmed))
    }
}

/// The budget of cells by what was measured while the model was warmed up: the smallest of its executors' ([`cost::budget`]). What
/// interrupts a measurement makes a size look slow and a larger one worth its time; hardly ever does so on each of them.
pub(super) fn measured_budget(model: ModelHandle, loaded: &ModelEntry, warmed: &[Warmed]) -> u64 {
    let batching = &loaded.manifest.batching;
    let shapes = batching.curve();
    let mut curves: BTreeMap<usize, Vec<(u64, Duration)>> = BTreeMap::new();
    for batch in warmed.iter().filter(|batch| batch.model == model && shapes.contains(&(batch.rows, batch.padded_len)))
    {
        let cells = u64::from(batch.rows) * u64::from(batch.padded_len);
        curves.entry(batch.executor).or_default().push((cells, batch.took));
    }
    let budget = curves.values().filter_map(|curve| cost::budget(curve)).min().unwrap_or(batching.padded_cells_max);
    let budget = budget.clamp(batching.bucket_longest().into(), batching.padded_cells_max);
    let rate = |(cells, took): &(u64, Duration)| format!("{cells}: {:.0}/s", *cells as f64 / took.as_secs_f64());
    for (executor, curve) in curves {
        let rates = curve.iter().map(rate).collect::<Vec<_>>().join(", ");
        tracing::info!(
            model = loaded.name(),
            executor,
            rates,
            "batches of so many cells run at so many cells a second"
        );
    }
    tracing::info!(model = loaded.name(), cells_max = budget, "larger batches bring little here for their time");
    budget
}
