//! Decides which replica takes a request, whether an outcome is worth another attempt, and when to reconnect.
//!
//! Pure: time and random numbers are arguments, so equal inputs give equal decisions, in a unit test or in the pool.
//!
//! - **Which replica**: the better of two that are drawn at random, by what is in flight there. That keeps the fullest
//!   replica within log log n of the mean, needs no fresh view of all of them, and does not send every client to the
//!   same one (M. Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, IEEE TPDS 12(10), 2001).
//! - **Whether to retry**: what the outcome's own hint says, and only if no model ran it, unless the caller opted in.
//! - **How often at all**: retries of the last ten seconds are at most a share of the requests of the same ten seconds
//!   plus a small reserve, so that clients cannot keep a server overloaded by repeating what it refused (N. Bronson et
//!   al., Metastable Failures in Distributed Systems, HotOS 2021). The law is that of finagle's `RetryBudget`. As in
//!   gRPC (proposal A6, transparent retries), what never left this process costs nothing, and what a leaving server
//!   handed back costs nothing the first time.
//! - **Who is asked whether it lives**: a replica where a call's time ran out without a word, or which owes an answer and
//!   has said nothing for long (calls need not have a deadline). A server says itself that a
//!   deadline passed, whatever its model does, so silence is the connection's fault or the server's. Its connections are
//!   asked (a ping) and get nothing until they are heard, where others are above suspicion; whatever is heard on one
//!   clears that one. This is what proxies do by outlier detection (Envoy's `consecutive_local_origin_failure`), with a
//!   question in place of a time of ejection: a replica that is only slow answers in one round trip, so there is no need
//!   to keep a share from being ejected.
//! - **When to reconnect**: after capped exponential backoff, half fixed and half random, so that clients of a replica
//!   that comes back do not arrive together (M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015).
//!
//! Always true
//! - A request that may have run is not sent again unless [`RouteOptions::retry_maybe_executed`] says so.
//! - A replica gets nothing before its overload pause is over, and nothing on a connection that said goaway.
//! - A replica is never kept from calls on suspicion where every other one is suspect, too.
//! - What is picked is given back exactly once: by `handle_end`, `handle_no_credit` or `handle_not_sent`.
//!
//! Elsewhere: threads, sockets, waiting (pool.rs), what the outcomes mean (vocab.rs).

use std::time::Duration;

use super::ClientError;
use crate::vocab::{Code, Executed, Moment, Retry};

/// Longest overload pause: a hint beyond it is a server's mistake that would cost us a replica.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A connection that was heard after it was asked is not asked again for so long: what then runs out is the calls' own
/// fault.
const BELIEVED: Duration = Duration::from_millis(200);
/// For servers that say "later" without saying when.
const PAUSE_MIN: Duration = Duration::from_millis(1);

#[derive(Clone, Debug)]
pub struct RouteOptions {
    /// Connections per replica.
    pub connections: usize,
    pub attempts_max: u32,
    pub retry_percent: u32,
    pub retry_reserve: u32,
    pub retry_maybe_executed: bool,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// A connection that owes an answer and has said nothing for so long is asked whether it lives.
    pub silence_max: Duration,
}

/// One connection of one replica. A number is never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId {
    pub replica: usize,
    pub number: u64,
}

/// What a replica is good for just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// Takes requests.
    Up,
    /// Being connected to.
    Connecting,
    /// Said that it is overloaded, and for how long.
    Paused,
    /// A call's time ran out there without a word: it is asked whether it lives, and what it is good for is not known.
    Suspect,
    /// Said goaway because it shuts down, and has not come back.
    Draining,
    /// Not reached; tried again after its backoff.
    Down,
}

/// Why a call was not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Another attempt is of no use, or might run the request twice.
    Final,
    /// It has had as many attempts as it may.
    Attempts,
    /// Too many of the recent requests were retried already.
    Budget,
    /// The deadline leaves no time for another attempt.
    Deadline,
    /// No replica could take it for as long as it may wait for one.
    NoReplica,
    /// As many calls wait as may.
    Full,
    /// The caller cancelled it.
    Cancelled,
    /// The pool was dropped.
    Closed,
}

/// How an attempt ended, as far as it tells something of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The server ended it: the connection works.
    Replied,
    /// Its deadline and the grace after it passed, and the server had said nothing.
    Silent,
    /// By the client, or with the connection.
    Here,
}

/// What to do after an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Retry,
    End(Stop),
}

/// What the router remembers of one call.
#[derive(Clone, Debug)]
pub struct Route {
    deadline: Moment,
    attempts: u32,
    executed: Executed,
    /// Replicas that sent it elsewhere. Asked again only when there is no other.
    avoid: Vec<usize>,
    /// A leaving server has handed it back before.
    moved: bool,
}

impl Route {
    pub fn new(deadline: Moment) -> Route {
        Route { deadline, attempts: 0, executed: Executed::Never, avoid: Vec::new(), moved: false }
    }

    pub fn deadline(&self) -> Moment {
        self.deadline
    }

    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Over all attempts so far: whether a model may have run.
    pub fn executed(&self) -> Executed {
        self.executed
    }
}

/// Where a request may be sent. The epoch tells whether credit came back between the pick and its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    pub link: LinkId,
    epoch: u64,
}

/// What the router has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteCounts {
    pub requests: u64,
    pub attempts: u64,
    pub retries: u64,
    pub retries_denied: u64,
    pub connects: u64,
    pub connects_failed: u64,
    pub connections_lost: u64,
    /// Connections that were asked whether they live.
    pub probes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    Connecting,
    Open,
    /// Its goaway came; what was accepted is still answered.
    Leaving,
}

#[derive(Debug)]
struct Link {
    id: LinkId,
    state: LinkState,
    opened_at: Moment,
    answered: bool,
    outstanding: usize,
    /// No credit since this epoch.
    full: bool,
    epoch: u64,
    trust: Trust,
    /// Since when it has owed answers and said nothing. Of no meaning while it owes none.
    quiet_since: Moment,
}

/// Whether a connection is taken to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// And is not doubted again before this moment.
    Yes(Moment),
    /// To be asked.
    Doubted,
    /// Asked, and not heard since.
    Asked,
}

impl Link {
    fn is_suspect(&self) -> bool {
        !matches!(self.trust, Trust::Yes(_))
    }

    /// Something came from the server.
    fn heard(&mut self, now: Moment) {
        self.quiet_since = now;
        if self.is_suspect() {
            self.trust = Trust::Yes(now + BELIEVED);
        }
    }
}

#[derive(Debug, Default)]
struct Replica {
    links: Vec<Link>,
    paused_until: Moment,
    draining: bool,
    /// Connections that failed in a row.
    failures: u32,
    retry_at: Moment,
    down_because: Option<ClientError>,
}

impl Replica {
    fn outstanding(&self) -> usize {
        self.links.iter().map(|link| link.outstanding).sum()
    }

    fn has(&self, state: LinkState) -> bool {
        self.links.iter().any(|link| link.state == state)
    }

    /// The connection with the least in flight among those that take requests. `also_suspect`: also of those that are.
    fn best_link(&self, also_suspect: bool) -> Option<usize> {
        let takes = |(_, link): &(usize, &Link)| {
            link.state == LinkState::Open && !link.full && (also_suspect || !link.is_suspect())
        };
        let best = self.links.iter().enumerate().filter(takes).min_by_key(|(_, link)| link.outstanding);
        best.map(|(at, _)| at)
    }

    fn takes_requests(&self, now: Moment, also_suspect: bool) -> bool {
        !self.draining && self.paused_until <= now && self.best_link(also_suspect).is_some()
    }

    /// Has a connection that is above suspicion, even if it takes nothing at the moment.
    fn is_well(&self) -> bool {
        !self.draining && self.links.iter().any(|link| link.state == LinkState::Open && !link.is_suspect())
    }

    /// The server refuses us, not our requests: waiting does not help.
    fn refuses_us(&self) -> bool {
        let code = self.down_because.as_ref().and_then(ClientError::code);
        matches!(code, Some(Code::Unauthenticated | Code::PermissionDenied)) && !self.has(LinkState::Open)
    }

    fn state(&self, now: Moment) -> ReplicaState {
        if self.draining {
            ReplicaState::Draining
        } else if self.has(LinkState::Open) {
            if self.paused_until > now {
                ReplicaState::Paused
            } else if self.is_well() {
                ReplicaState::Up
            } else {
                ReplicaState::Suspect
            }
        } else if self.has(LinkState::Connecting) {
            ReplicaState::Connecting
        } else {
            ReplicaState::Down
        }
    }

    /// When a request could be sent here at the earliest, as far as is known.
    fn available_at(&self, now: Moment) -> Moment {
        let connected_at = match self.has(LinkState::Open) && !self.draining || self.has(LinkState::Connecting) {
            true => now,
            false => self.retry_at.max(now),
        };
        connected_at.max(self.paused_until)
    }
}

/// All replicas, and what may be retried.
#[derive(Debug)]
pub struct Router {
    options: RouteOptions,
    replicas: Vec<Replica>,
    links_made: u64,
    budget: Budget,
    counts: RouteCounts,
}

impl Router {
    pub fn new(replicas: usize, options: RouteOptions) -> Router {
        let budget = Budget::new(options.retry_percent, options.retry_reserve);
        let replicas = (0..replicas).map(|_| Replica::default()).collect();
        Router { options, replicas, links_made: 0, budget, counts: RouteCounts::default() }
    }

    pub fn counts(&self) -> RouteCounts {
        self.counts
    }

    pub fn state(&self, replica: usize, now: Moment) -> ReplicaState {
        self.replicas[replica].state(now)
    }

    pub fn outstanding(&self, replica: usize) -> usize {
        self.replicas[replica].outstanding()
    }

    /// Connections that are open and have not said goaway.
    pub fn open_links(&self, replica: usize) -> usize {
        self.replicas[replica].links.iter().filter(|link| link.state == LinkState::Open).count()
    }

    /// Why a replica could not be reached, when it could not.
    pub fn down_because(&self) -> Option<&ClientError> {
        self.replicas.iter().find_map(|replica| replica.down_because.as_ref())
    }

    /// Set when every replica refuses this client for what it is: no waiting changes that.
    pub fn refused_everywhere(&self) -> Option<&ClientError> {
        self.replicas.iter().all(Replica::refuses_us).then(|| self.down_because()).flatten()
    }

    fn link(&mut self, id: LinkId) -> Option<&mut Link> {
        self.replicas[id.replica].links.iter_mut().find(|link| link.id == id)
    }

    // ---- connections

    /// A connection to be made now. A replica that failed is tried by one connection until one stands.
    pub fn poll_connect(&mut self, now: Moment) -> Option<LinkId> {
        let wanted_when_well = self.options.connections;
        for (index, replica) in self.replicas.iter_mut().enumerate() {
            let wanted = match replica.failures > 0 && !replica.has(LinkState::Open) {
                true => 1,
                false => wanted_when_well,
            };
            let there = replica.links.iter().filter(|link| link.state != LinkState::Leaving).count();
            if there < wanted && replica.retry_at <= now {
                self.links_made += 1;
                let id = LinkId { replica: index, number: self.links_made };
                replica.links.push(Link {
                    id,
                    state: LinkState::Connecting,
                    opened_at: now,
                    answered: false,
                    outstanding: 0,
                    full: false,
                    epoch: 0,
                    trust: Trust::Yes(now),
                    quiet_since: now,
                });
                return Some(id);
            }
        }
        None
    }

    /// A connection to be closed: it was left and owes nothing more. Servers close these themselves, most of them.
    pub fn poll_close(&mut self) -> Option<LinkId> {
        for replica in &mut self.replicas {
            let idle = |link: &Link| link.state == LinkState::Leaving && link.outstanding == 0;
            if let Some(at) = replica.links.iter().position(idle) {
                return Some(replica.links.swap_remove(at).id);
            }
        }
        None
    }

    /// A connection that is to be asked now whether it lives. Whatever is heard on it is told by `handle_end` or
    /// `handle_alive`; where nothing is, the caller ends it in its own time.
    pub fn poll_probe(&mut self, now: Moment) -> Option<LinkId> {
        let silence_max = self.options.silence_max;
        for link in self.replicas.iter_mut().flat_map(|replica| &mut replica.links) {
            let is_quiet = link.outstanding > 0 && link.quiet_since + silence_max <= now;
            if is_quiet && link.state == LinkState::Open && !link.is_suspect() {
                link.trust = Trust::Doubted;
            }
        }
        let mut links = self.replicas.iter_mut().flat_map(|replica| &mut replica.links);
        let link = links.find(|link| link.state == LinkState::Open && link.trust == Trust::Doubted)?;
        link.trust = Trust::Asked;
        self.counts.probes += 1;
        Some(link.id)
    }

    /// A connection that was asked has answered.
    pub fn handle_alive(&mut self, id: LinkId, now: Moment) {
        if let Some(link) = self.link(id) {
            link.heard(now);
        }
    }

    /// Whether a connection was asked and is not heard since.
    pub fn is_suspect(&mut self, id: LinkId) -> bool {
        self.link(id).is_some_and(|link| link.is_suspect())
    }

    /// When time alone changes something next. Never later than it is time to look for connections that are silent: the
    /// pool's thread is not told of each call, so it looks as often as that, whether there are calls or not.
    pub fn poll_timeout(&self, now: Moment) -> Moment {
        let moments = self.replicas.iter().flat_map(|replica| [replica.retry_at, replica.paused_until]);
        let look_at = now + self.options.silence_max;
        moments.filter(|moment| *moment > now).min().map_or(look_at, |moment| moment.min(look_at))
    }

    /// False when the connection has ended meanwhile.
    pub fn handle_connected(&mut self, id: LinkId, now: Moment) -> bool {
        let Some(link) = self.link(id) else { return false };
        link.opened_at = now;
        // It may have said goaway already.
        if link.state == LinkState::Connecting {
            link.state = LinkState::Open;
            let replica = &mut self.replicas[id.replica];
            replica.draining = false;
            replica.down_because = None;
        }
        self.counts.connects += 1;
        true
    }

    pub fn handle_connect_failed(&mut self, id: LinkId, error: ClientError, now: Moment, random: u64) {
        let replica = &mut self.replicas[id.replica];
        replica.links.retain(|link| link.id != id);
        replica.down_because = Some(error);
        self.counts.connects_failed += 1;
        self.back_off(id.replica, now, random);
    }

    /// The connection's goaway came.
    pub fn handle_leaving(&mut self, id: LinkId, code: Option<Code>, now: Moment, random: u64) {
        let Some(link) = self.link(id).filter(|link| link.state != LinkState::Leaving) else { return };
        link.state = LinkState::Leaving;
        self.forgive(id, now);
        // The other connections will hear it too; there is no need to learn it from each.
        self.replicas[id.replica].draining |= code == Some(Code::Draining);
        self.back_off(id.replica, now, random);
    }

    /// The connection ended. What was in flight on it is ended by the caller, one by one, before or after.
    pub fn handle_lost(&mut self, id: LinkId, now: Moment, random: u64) {
        let Some(link) = self.link(id) else { return };
        let was_left = link.state == LinkState::Leaving;
        self.forgive(id, now);
        self.replicas[id.replica].links.retain(|link| link.id != id);
        if !was_left {
            self.counts.connections_lost += 1;
            self.back_off(id.replica, now, random);
        }
    }

    /// A connection that lasted was no failure: servers end idle ones.
    fn forgive(&mut self, id: LinkId, now: Moment) {
        let lasted = self.options.backoff_max;
        let link = self.link(id).expect("the callers found it");
        if now.since(link.opened_at) >= lasted {
            self.replicas[id.replica].failures = 0;
        }
    }

    fn back_off(&mut self, replica: usize, now: Moment, random: u64) {
        let replica = &mut self.replicas[replica];
        if replica.retry_at > now {
            return; // what ended several connections at once counts once
        }
        let doublings = replica.failures.min(16);
        let most = self.options.backoff_min.saturating_mul(1 << doublings).min(self.options.backoff_max);
        replica.failures = replica.failures.saturating_add(1);
        replica.retry_at = now + most / 2 + part(most / 2, random);
    }

    // ---- requests

    /// Counts a new request: it pays for a share of a retry.
    pub fn handle_request(&mut self, now: Moment) {
        self.counts.requests += 1;
        self.budget.deposit(now);
    }

    /// A connection for this call's next attempt, or `None` while there is none.
    pub fn pick(&mut self, route: &mut Route, now: Moment, random: u64) -> Option<Pick> {
        // Waiting for one that is known to live beats asking one that may not.
        let also_suspect = !self.replicas.iter().any(Replica::is_well);
        let replica = self.choose(now, random, &route.avoid, also_suspect).or_else(|| {
            // Nobody else: then perhaps one of those that said no.
            if route.avoid.is_empty() { None } else { self.choose(now, random, &[], also_suspect) }
        })?;
        let replica = &mut self.replicas[replica];
        let at = replica.best_link(also_suspect).expect("a replica that takes requests has a link that does");
        let link = &mut replica.links[at];
        if link.outstanding == 0 {
            link.quiet_since = now;
        }
        link.outstanding += 1;
        route.attempts += 1;
        self.counts.attempts += 1;
        Some(Pick { link: link.id, epoch: link.epoch })
    }

    /// Two choices among the replicas that take requests.
    fn choose(&self, now: Moment, random: u64, avoid: &[usize], also_suspect: bool) -> Option<usize> {
        let takes = |index: &usize| !avoid.contains(index) && self.replicas[*index].takes_requests(now, also_suspect);
        let candidates = (0..self.replicas.len()).filter(takes);
        let count = candidates.clone().count();
        let nth = |n: usize| candidates.clone().nth(n).expect("fewer than were counted");
        match count {
            0 => None,
            1 => Some(nth(0)),
            _ => {
                let first = (random >> 32) as usize % count;
                let second = (random & 0xFFFF_FFFF) as usize % (count - 1);
                let second = second + usize::from(second >= first); // any but the first
                [first, second].map(nth).into_iter().min_by_key(|index| self.replicas[*index].outstanding())
            }
        }
    }

    /// The connection of a pick had no credit. The pick is undone.
    pub fn handle_no_credit(&mut self, pick: Pick, route: &mut Route) {
        self.handle_not_sent(pick, route);
        if let Some(link) = self.link(pick.link) {
            // Credit that came back in between would otherwise be waited for, for ever.
            link.full |= link.epoch == pick.epoch;
        }
    }

    /// A pick that came to nothing, by no fault of the connection.
    pub fn handle_not_sent(&mut self, pick: Pick, route: &mut Route) {
        route.attempts -= 1;
        self.counts.attempts -= 1;
        if let Some(link) = self.link(pick.link) {
            link.outstanding -= 1;
        }
    }

    pub fn handle_credit(&mut self, id: LinkId) {
        if let Some(link) = self.link(id) {
            link.full = false;
            link.epoch += 1;
        }
    }

    /// An attempt ended. True when the pool's thread has something to do now: a connection is to be closed, or asked.
    pub fn handle_end(&mut self, id: LinkId, ended: Ended, now: Moment) -> bool {
        let Some(link) = self.link(id) else { return false };
        link.outstanding -= 1;
        let closes = link.state == LinkState::Leaving && link.outstanding == 0;
        link.full = false;
        link.epoch += 1;
        match ended {
            Ended::Replied => {
                link.heard(now);
                if !link.answered && link.state == LinkState::Open {
                    link.answered = true;
                    self.replicas[id.replica].failures = 0;
                }
            }
            Ended::Silent => return self.doubt(id.replica, now) | closes,
            Ended::Here => {}
        }
        closes
    }

    /// What keeps one connection silent often keeps its neighbours silent, too: all are asked.
    fn doubt(&mut self, replica: usize, now: Moment) -> bool {
        let mut any = false;
        for link in &mut self.replicas[replica].links {
            let doubted = link.state == LinkState::Open && matches!(link.trust, Trust::Yes(until) if until <= now);
            if doubted {
                link.trust = Trust::Doubted;
            }
            any |= doubted;
        }
        any
    }

    /// Whether the call gets another attempt after this error of an attempt at `replica`.
    pub fn judge(&mut self, route: &mut Route, replica: usize, error: &ClientError, now: Moment, random: u64) -> Next {
        route.executed = worse(route.executed, error.executed());
        let Some(advice) = advice(error, self.options.retry_maybe_executed) else { return Next::End(Stop::Final) };
        match advice {
            Advice::Same => {}
            Advice::Elsewhere => route.avoid.push(replica),
            Advice::After(wait) => {
                let wait = wait.clamp(PAUSE_MIN, PAUSE_MAX);
                // Never earlier than asked; a little later, so that not everybody comes back at once.
                let until = now + wait + part(wait / 4, random);
                let paused_until = &mut self.replicas[replica].paused_until;
                *paused_until = until.max(*paused_until);
            }
        }
        if route.attempts >= self.options.attempts_max {
            return Next::End(Stop::Attempts);
        }
        let soonest = self.replicas.iter().map(|replica| replica.available_at(now)).min();
        if soonest.is_none_or(|soonest| soonest >= route.deadline) {
            return Next::End(Stop::Deadline);
        }
        if !is_free(error, &mut route.moved) && !self.budget.withdraw(now) {
            self.counts.retries_denied += 1;
            return Next::End(Stop::Budget);
        }
        self.counts.retries += 1;
        Next::Retry
    }
}

enum Advice {
    /// Anywhere, also there.
    Same,
    Elsewhere,
    After(Duration),
}

/// What the outcome says about another attempt; `None` when there is to be none.
fn advice(error: &ClientError, maybe_executed: bool) -> Option<Advice> {
    if error.executed() != Executed::Never && !maybe_executed {
        return None;
    }
    match error {
        ClientError::Refused(refusal) => match refusal.retry {
            // A deadline that the server could not keep is not met by asking again.
            Retry::No | Retry::ClientDecides => None,
            Retry::Same => Some(Advice::Same),
            Retry::Elsewhere => Some(Advice::Elsewhere),
            Retry::After => Some(Advice::After(Duration::from_millis(refusal.retry_after_ms.into()))),
        },
        // Where one connection broke, its neighbours often break next.
        ClientError::Goaway { .. }
        | ClientError::ConnectionLost { .. }
        | ClientError::Connect(_)
        | ClientError::Protocol(_) => Some(Advice::Elsewhere),
        // Another replica may have the contract that the request is built for.
        ClientError::Contract(refusal) if refusal.retry == Retry::Elsewhere => Some(Advice::Elsewhere),
        ClientError::NoCredit => Some(Advice::Same),
        ClientError::Contract(_) | ClientError::DeadlineExceeded { .. } | ClientError::Usage(_) => None,
    }
}

/// Retries that put no load on a server which it did not hand back: always what was never sent, once what a leaving
/// server did not take.
fn is_free(error: &ClientError, moved: &mut bool) -> bool {
    match error {
        ClientError::ConnectionLost { executed: Executed::Never, .. } | ClientError::Connect(_) => true,
        ClientError::Goaway { .. } => !std::mem::replace(moved, true),
        ClientError::Refused(refusal) if refusal.code == Code::Draining => !std::mem::replace(moved, true),
        _ => false,
    }
}

fn worse(a: Executed, b: Executed) -> Executed {
    if a as u8 >= b as u8 { a } else { b }
}

/// A random part of `whole`.
fn part(whole: Duration, random: u64) -> Duration {
    whole.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

const SLICES: usize = 10;
const SLICE: Duration = Duration::from_secs(1);

/// Counts requests and retries of the last ten seconds, and allows a retry while they keep the law.
#[derive(Debug)]
struct Budget {
    percent: u64,
    reserve: u64,
    slices: [Slice; SLICES],
    /// The newest slice, counted from the clock's start.
    newest: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    requests: u64,
    retries: u64,
}

impl Budget {
    fn new(percent: u32, reserve: u32) -> Budget {
        Budget { percent: percent.into(), reserve: reserve.into(), slices: [Slice::default(); SLICES], newest: 0 }
    }

    fn deposit(&mut self, now: Moment) {
        self.slice(now).requests += 1;
    }

    fn withdraw(&mut self, now: Moment) -> bool {
        self.slice(now); // forgets what is too old to count
        let requests: u64 = self.slices.iter().map(|slice| slice.requests).sum();
        let retries: u64 = self.slices.iter().map(|slice| slice.retries).sum();
        let allowed = (retries + 1) * 100 <= requests * self.percent + self.reserve * 100;
        self.slice(now).retries += u64::from(allowed);
        allowed
    }

    fn slice(&mut self, now: Moment) -> &mut Slice {
        let slice = now.nanos() / SLICE.as_nanos() as u64;
        let passed = slice.saturating_sub(self.newest).min(SLICES as u64);
        for _ in 0..passed {
            self.newest += 1;
            self.slices[(self.newest % SLICES as u64) as usize] = Slice::default();
        }
        self.newest = self.newest.max(slice);
        &mut self.slices[(self.newest % SLICES as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::Refusal;
    use rand::rngs::SmallRng;
    use rand::{Rng, RngCore, SeedableRng};

    const MS: Duration = Duration::from_millis(1);

    fn options() -> RouteOptions {
        RouteOptions {
            connections: 1,
            attempts_max: 4,
            retry_percent: 10,
            retry_reserve: 5,
            retry_maybe_executed: false,
            backoff_min: 100 * MS,
            backoff_max: 1600 * MS,
            silence_max: Duration::from_secs(100),
        }
    }

    fn at(ms: u64) -> Moment {
        Moment::ZERO + Duration::from_millis(ms)
    }

    /// A router whose replicas are all connected at time 0, and its connections.
    fn up(replicas: usize, options: RouteOptions) -> (Router, Vec<LinkId>) {
        let mut router = Router::new(replicas, options);
        let links: Vec<LinkId> = std::iter::from_fn(|| router.poll_connect(Moment::ZERO)).collect();
        links.iter().for_each(|link| assert!(router.handle_connected(*link, Moment::ZERO)));
        (router, links)
    }

    fn route() -> Route {
        Route::new(Moment::FAR)
    }

    fn overloaded(ms: u32) -> ClientError {
        ClientError::Refused(Refusal::overloaded("full", Duration::from_millis(ms.into())))
    }

    fn refused(code: Code) -> ClientError {
        ClientError::Refused(Refusal::new(code, ""))
    }

    fn goaway(code: Code) -> ClientError {
        ClientError::Goaway { code: Some(code), message: String::new() }
    }

    fn lost(executed: Executed) -> ClientError {
        ClientError::ConnectionLost { executed, reason: String::new() }
    }

    #[test]
    fn every_outcome_is_retried_exactly_when_the_contract_says_that_it_may_be() {
        let next = |error: &ClientError, maybe: bool| {
            let (mut router, _) = up(2, RouteOptions { retry_maybe_executed: maybe, ..options() });
            router.judge(&mut route(), 0, error, at(1), 0) == Next::Retry
        };
        for code in Code::ALL {
            let error = refused(*code);
            let hint = !matches!(code.retry(), Retry::No | Retry::ClientDecides);
            assert_eq!(next(&error, false), hint && code.executed() == Executed::Never, "{code}");
            assert_eq!(next(&error, true), hint, "{code}");
        }
        let mut in_queue = Refusal::new(Code::ExecutorFailed, "");
        in_queue.executed = Executed::Never;
        let table = [
            (ClientError::Refused(in_queue), true, true),
            (goaway(Code::Draining), true, true),
            (goaway(Code::ProtocolError), true, true),
            (lost(Executed::Never), true, true),
            (lost(Executed::Maybe), false, true),
            (ClientError::Connect(String::new()), true, true),
            (ClientError::Protocol(String::new()), false, true),
            (ClientError::Contract(Refusal::invalid("")), false, false),
            (ClientError::Contract(Refusal { retry: Retry::Elsewhere, ..Refusal::invalid("") }), true, true),
            (ClientError::DeadlineExceeded { executed: Executed::Never }, false, false),
            (ClientError::DeadlineExceeded { executed: Executed::Maybe }, false, false),
            (ClientError::Usage(String::new()), false, false),
        ];
        for (error, by_default, opted_in) in table {
            assert_eq!((next(&error, false), next(&error, true)), (by_default, opted_in), "{error:?}");
        }
    }

    #[test]
    fn of_two_replicas_the_one_with_less_in_flight_is_chosen() {
        let (mut router, links) = up(2, options());
        for random in [0, u64::MAX, 1 << 32, 0x1234_5678_9ABC_DEF0] {
            let first = router.pick(&mut route(), at(0), random).expect("both are up").link;
            let second = router.pick(&mut route(), at(0), random).expect("both are up").link;
            assert_ne!(first, second, "the second goes where the first did not");
        }
        links.iter().for_each(|link| assert_eq!(router.outstanding(link.replica), 4));
    }

    #[test]
    fn two_choices_keep_many_replicas_nearly_even() {
        let (mut router, _) = up(50, options());
        let mut random = SmallRng::seed_from_u64(7);
        for _ in 0..5000 {
            router.pick(&mut route(), at(0), random.next_u64()).expect("all are up");
        }
        let fullest = (0..50).map(|replica| router.outstanding(replica)).max().expect("fifty");
        // One choice would give about 100 + 2.2 * 10; two give the mean and a few.
        assert!(fullest <= 105, "{fullest}");
    }

    #[test]
    fn an_overloaded_replica_gets_nothing_before_its_time() {
        let mut random = SmallRng::seed_from_u64(3);
        for _ in 0..200 {
            let (mut router, links) = up(2, options());
            let mut call = route();
            let hint = random.random_range(1..500);
            let next = router.judge(&mut call, links[0].replica, &overloaded(hint), at(1000), random.next_u64());
            assert_eq!(next, Next::Retry);
            assert_eq!(router.state(0, at(1000)), ReplicaState::Paused);
            for ms in [1000, 1000 + u64::from(hint) - 1] {
                let pick = router.pick(&mut call, at(ms), random.next_u64()).expect("the other is up");
                assert_eq!(pick.link, links[1]);
            }
            router.handle_lost(links[1], at(1000), 0);
            let back = at(1000) + Duration::from_millis(hint.into()).mul_f64(1.25);
            assert!(router.poll_timeout(at(1000)) <= back, "somebody wakes up for it");
            let pick = router.pick(&mut call, back, random.next_u64()).expect("its pause is over");
            assert_eq!(pick.link, links[0]);
        }
    }

    #[test]
    fn a_hint_beyond_the_deadline_ends_the_call_at_once() {
        let (mut router, _) = up(1, options());
        let mut call = Route::new(at(50));
        assert_eq!(router.judge(&mut call, 0, &overloaded(49), at(0), 0), Next::Retry);
        assert_eq!(router.judge(&mut call, 0, &overloaded(50), at(0), 0), Next::End(Stop::Deadline));
    }

    #[test]
    fn attempts_are_bounded() {
        let (mut router, _) = up(2, options());
        let mut call = route();
        for attempt in 1..=4 {
            let pick = router.pick(&mut call, at(0), attempt).expect("both are up");
            router.handle_end(pick.link, Ended::Here, at(0));
            let next = router.judge(&mut call, pick.link.replica, &lost(Executed::Never), at(0), 0);
            assert_eq!(next, if attempt < 4 { Next::Retry } else { Next::End(Stop::Attempts) });
        }
    }

    #[test]
    fn who_was_sent_elsewhere_returns_only_when_there_is_nobody_else() {
        let (mut router, links) = up(3, options());
        let mut call = route();
        for said_no in 0..3u64 {
            for random in 0..20u64 {
                let mut copy = call.clone();
                let pick = router.pick(&mut copy, at(0), random.wrapping_mul(0x9E37_79B9_7F4A_7C15)).expect("up");
                assert!(pick.link.replica as u64 >= said_no, "{pick:?}");
            }
            router.judge(&mut call, said_no as usize, &refused(Code::Draining), at(0), 0);
        }
        assert!(links.contains(&router.pick(&mut call, at(0), 0).expect("better than nothing").link));
    }

    /// Goal: however a storm of refusals arrives, retries keep the law. Method: random arrivals over virtual minutes,
    /// every outcome a refusal; after each granted retry, count both in the last nine seconds (a window which the
    /// slices cover whole) and in the last ten.
    #[test]
    fn retries_stay_within_the_budget_under_any_arrivals() {
        for seed in 0..20 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (mut router, _) = up(2, RouteOptions { attempts_max: u32::MAX, ..options() });
            let (mut requests, mut retries): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
            let mut now = 0;
            while now < 60_000 {
                now +=
                    if random.random_bool(0.01) { random.random_range(0..15_000) } else { random.random_range(0..20) };
                for _ in 0..random.random_range(0..5) {
                    router.handle_request(at(now));
                    requests.push(now);
                }
                for _ in 0..random.random_range(0..10) {
                    if router.judge(&mut route(), 0, &refused(Code::ChecksumMismatch), at(now), 0) != Next::Retry {
                        continue;
                    }
                    retries.push(now);
                    let since = |all: &[u64], ms: u64| all.iter().filter(|then| **then + ms > now).count();
                    let (spent, paid) = (since(&retries, 9000), since(&requests, 10_000));
                    assert!(
                        spent * 100 <= paid * 10 + 500,
                        "repeat with: seed {seed}; {spent} retries, {paid} requests"
                    );
                }
            }
            assert!(retries.len() > 50, "the budget was used");
            assert!(router.counts().retries_denied > 0, "and it was used up");
            assert_eq!(router.counts().retries, retries.len() as u64);
        }
    }

    #[test]
    fn what_was_never_sent_costs_no_budget_and_a_leaving_server_is_free_once() {
        let (mut router, _) = up(2, RouteOptions { retry_percent: 0, retry_reserve: 0, ..options() });
        let judge = |router: &mut Router, call: &mut Route, error| router.judge(call, 0, &error, at(0), 0);
        let mut call = route();
        for _ in 0..10 {
            assert_eq!(judge(&mut router, &mut call, lost(Executed::Never)), Next::Retry);
        }
        assert_eq!(judge(&mut router, &mut call, goaway(Code::Draining)), Next::Retry);
        assert_eq!(judge(&mut router, &mut call, goaway(Code::Draining)), Next::End(Stop::Budget));
        assert_eq!(judge(&mut router, &mut route(), overloaded(1)), Next::End(Stop::Budget));
        assert_eq!(router.counts().retries_denied, 2);
    }

    #[test]
    fn reconnects_wait_longer_each_time_up_to_a_cap_and_start_over_after_an_answer() {
        let mut random = SmallRng::seed_from_u64(11);
        let mut router = Router::new(1, options());
        let mut now = at(0);
        for most in [100u32, 200, 400, 800, 1600, 1600, 1600] {
            let link = router.poll_connect(now).expect("it is due");
            router.handle_connect_failed(link, ClientError::Connect("refused".into()), now, random.next_u64());
            assert_eq!((router.poll_connect(now), router.state(0, now)), (None, ReplicaState::Down));
            let due = router.poll_timeout(now);
            let waited = due.since(now);
            assert!(waited >= most * MS / 2 && waited <= most * MS, "{waited:?} of {most} ms");
            now = due;
        }
        let link = router.poll_connect(now).expect("it is due");
        assert!(router.handle_connected(link, now));
        let pick = router.pick(&mut route(), now, 0).expect("it is up");
        router.handle_end(pick.link, Ended::Replied, now);
        router.handle_lost(link, now, u64::MAX);
        assert!(router.poll_timeout(now).since(now) <= 100 * MS, "an answer showed that it works");
    }

    #[test]
    fn a_replica_that_failed_is_tried_by_one_connection_and_then_by_all() {
        let mut router = Router::new(1, RouteOptions { connections: 3, ..options() });
        let links: Vec<LinkId> = std::iter::from_fn(|| router.poll_connect(at(0))).collect();
        assert_eq!(links.len(), 3);
        for link in links {
            router.handle_connect_failed(link, ClientError::Connect(String::new()), at(0), 0);
        }
        assert!(router.poll_timeout(at(0)) <= at(100), "three failures at once count once");
        let probe = router.poll_connect(at(100)).expect("it is due");
        assert_eq!(router.poll_connect(at(100)), None);
        assert!(router.handle_connected(probe, at(100)));
        assert_eq!(std::iter::from_fn(|| router.poll_connect(at(100))).count(), 2);
    }

    #[test]
    fn a_draining_replica_gets_nothing_until_a_new_connection_stands() {
        let (mut router, links) = up(1, RouteOptions { connections: 2, ..options() });
        let busy = router.pick(&mut route(), at(0), 0).expect("it is up").link;
        router.handle_leaving(busy, Some(Code::Draining), at(0), 0);
        let other = *links.iter().find(|link| **link != busy).expect("two connections");
        assert_eq!(router.state(0, at(0)), ReplicaState::Draining);
        assert_eq!(router.pick(&mut route(), at(0), 0), None, "its other connection hears the same in a moment");
        router.handle_leaving(other, Some(Code::Draining), at(0), 0);
        assert_eq!(router.poll_close(), Some(other), "nothing is in flight there");
        assert_eq!(router.poll_close(), None, "the other still owes an answer");
        assert!(router.handle_end(busy, Ended::Replied, at(0)), "somebody is to close it");
        assert_eq!(router.poll_close(), Some(busy));
        let link = router.poll_connect(at(100)).expect("after the backoff");
        assert!(router.handle_connected(link, at(100)));
        assert_eq!(router.state(0, at(100)), ReplicaState::Up);
        assert_eq!(router.pick(&mut route(), at(100), 0).expect("it is back").link, link);
    }

    #[test]
    fn idle_connections_that_end_after_long_are_no_failures() {
        let (mut router, _) = up(1, options());
        let mut now = at(0);
        for _ in 0..10 {
            now = now + Duration::from_secs(300);
            let link = router.replicas[0].links[0].id;
            router.handle_leaving(link, Some(Code::ProtocolError), now, u64::MAX);
            router.handle_lost(link, now, u64::MAX);
            let due = router.poll_timeout(now);
            assert!(due.since(now) <= 100 * MS);
            now = due;
            let link = router.poll_connect(now).expect("it is due");
            assert!(router.handle_connected(link, now));
        }
    }

    #[test]
    fn credit_that_returns_while_its_lack_is_noted_is_not_forgotten() {
        let (mut router, links) = up(1, options());
        let mut call = route();
        let pick = router.pick(&mut call, at(0), 0).expect("it is up");
        router.handle_credit(links[0]); // the reader was faster than whoever found no credit
        router.handle_no_credit(pick, &mut call);
        assert_eq!(call.attempts(), 0);
        let pick = router.pick(&mut call, at(0), 0).expect("there may be credit");
        router.handle_no_credit(pick, &mut call);
        assert_eq!(router.pick(&mut call, at(0), 0), None, "there was none, and none came");
        router.handle_credit(links[0]);
        assert!(router.pick(&mut call, at(0), 0).is_some());
    }

    #[test]
    fn a_replica_that_let_a_call_run_out_gets_nothing_until_it_is_heard_again() {
        let (mut router, links) = up(2, RouteOptions { connections: 2, ..options() });
        let of = |replica: usize| links.iter().copied().filter(move |link| link.replica == replica);
        // Calls that end in any other way say nothing against it.
        for ended in [Ended::Replied, Ended::Here] {
            let pick = router.pick(&mut route(), at(0), 0).expect("both are up");
            assert!(!router.handle_end(pick.link, ended, at(0)) && router.poll_probe(at(502)).is_none());
        }
        let silent = router.pick(&mut route(), at(0), 0).expect("both are up").link.replica;
        let silent_link = of(silent).find(|link| router.link(*link).expect("open").outstanding == 1).expect("picked");
        assert!(router.handle_end(silent_link, Ended::Silent, at(500)), "somebody is to ask");
        assert_eq!(router.state(silent, at(500)), ReplicaState::Suspect);
        let mut asked: Vec<LinkId> = std::iter::from_fn(|| router.poll_probe(at(502))).collect();
        asked.sort_unstable();
        assert_eq!(asked, of(silent).collect::<Vec<_>>(), "each of its connections, once");
        for random in 0..50u64 {
            let random = random.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let pick = router.pick(&mut route(), at(500), random).expect("the other is up");
            assert_eq!(pick.link.replica, 1 - silent);
        }
        // One of its connections answers: that one, and no more, is used again, and is the emptier one.
        router.handle_alive(silent_link, at(501));
        assert_eq!(router.state(silent, at(501)), ReplicaState::Up);
        assert_eq!(router.pick(&mut route(), at(501), 0).expect("both are up").link, silent_link);
        // What runs out there now is the calls' own fault, for a while.
        assert!(!router.handle_end(silent_link, Ended::Silent, at(502)) && router.poll_probe(at(502)).is_none());
        router.pick(&mut route(), at(502), 0).expect("both are up");
        assert!(router.handle_end(silent_link, Ended::Silent, at(701)), "and then it is asked again");
        assert_eq!(router.poll_probe(at(502)), Some(silent_link));
        assert_eq!(router.counts().probes, 3);
    }

    #[test]
    fn an_answer_to_any_call_clears_a_connection_as_a_pong_does() {
        let (mut router, links) = up(1, options());
        let picks = [0, 0].map(|random| router.pick(&mut route(), at(0), random).expect("it is up"));
        assert!(router.handle_end(picks[0].link, Ended::Silent, at(500)));
        assert!(router.is_suspect(links[0]));
        router.handle_end(picks[1].link, Ended::Replied, at(501));
        assert!(!router.is_suspect(links[0]));
        assert_eq!(router.poll_probe(at(502)), None, "it need not be asked any more");
    }

    #[test]
    fn a_connection_that_owes_an_answer_and_says_nothing_for_long_is_asked_and_an_idle_one_is_not() {
        let (mut router, links) = up(1, RouteOptions { connections: 2, silence_max: 1000 * MS, ..options() });
        assert_eq!(router.poll_probe(at(60_000)), None, "nothing is owed");
        let busy = router.pick(&mut route(), at(60_000), 0).expect("it is up").link;
        assert!(router.poll_timeout(at(60_000)) <= at(61_000), "somebody looks");
        assert_eq!(router.poll_probe(at(60_999)), None);
        assert_eq!(router.poll_probe(at(61_000)), Some(busy));
        assert_eq!(router.poll_probe(at(61_000)), None, "asked once, and the idle one not at all");
        // A model that takes long, on a server that lives.
        router.handle_alive(busy, at(61_001));
        assert_eq!(router.poll_probe(at(62_000)), None);
        assert_eq!(router.poll_probe(at(62_001)), Some(busy), "and again after as long");
        router.handle_end(busy, Ended::Replied, at(62_002));
        assert_eq!(router.poll_probe(at(90_000)), None, "nothing is owed any more");
        assert!(links.iter().all(|link| !router.is_suspect(*link)));
    }

    #[test]
    fn where_all_are_suspect_all_are_used_and_where_one_lives_it_is_waited_for() {
        let (mut router, links) = up(2, options());
        for link in &links {
            router.pick(&mut route(), at(0), 0).expect("both are up");
            router.pick(&mut route(), at(0), u64::MAX).expect("both are up");
            router.handle_end(*link, Ended::Silent, at(500));
        }
        assert!((0..2).all(|replica| router.state(replica, at(500)) == ReplicaState::Suspect));
        assert!(router.pick(&mut route(), at(500), 0).is_some(), "better than nothing");
        // One answers, and has no room just now: that is no reason to give calls to one which may be dead.
        router.handle_alive(links[1], at(500));
        let pick = router.pick(&mut route(), at(500), 0).expect("it lives");
        assert_eq!(pick.link, links[1]);
        router.handle_no_credit(pick, &mut route_of_one_attempt());
        assert_eq!(router.pick(&mut route(), at(500), 0), None);
        router.handle_credit(links[1]);
        assert_eq!(router.pick(&mut route(), at(500), 0).expect("it has room").link, links[1]);
        // It leaves: then the other is all there is.
        router.handle_lost(links[1], at(500), 0);
        assert_eq!(router.pick(&mut route(), at(500), 0).expect("better than nothing").link, links[0]);
    }

    fn route_of_one_attempt() -> Route {
        Route { attempts: 1, ..route() }
    }

    /// Goal: a replica that goes silent costs the calls it had and hardly any more; one that is only slow costs none.
    /// Method: a virtual minute of calls at random moments, half of which take longer than they may, which is said by the
    /// replica; but from the tenth second to the fortieth replica 0 says nothing (its pongs come when that is over).
    #[test]
    fn a_silent_replica_costs_the_calls_it_had_and_no_stream_of_them() {
        let (deadline, grace) = (200, 50);
        for seed in 0..20 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (mut router, _) = up(2, RouteOptions { connections: 2, ..options() });
            // By when it ends.
            let mut open: Vec<(u64, LinkId, Ended)> = Vec::new();
            let mut pongs: Vec<(u64, LinkId)> = Vec::new();
            let (mut silent, mut in_the_dark, mut after) = (0, 0, [0; 2]);
            let is_dark = |link: LinkId, ms: u64| link.replica == 0 && (10_000..40_000).contains(&ms);
            for now in 0..60_000u64 {
                open.sort_unstable_by_key(|(due, ..)| std::cmp::Reverse(*due));
                while let Some((_, link, ended)) = open.pop_if(|(due, ..)| *due <= now) {
                    silent += u64::from(ended == Ended::Silent);
                    router.handle_end(link, ended, at(now));
                }
                while let Some(link) = router.poll_probe(at(now)) {
                    pongs.push((if is_dark(link, now) { 40_001 } else { now + 1 }, link));
                }
                for (_, link) in pongs.extract_if(.., |(due, _)| *due <= now) {
                    router.handle_alive(link, at(now));
                }
                if random.random_bool(0.5) {
                    let pick = router.pick(&mut route(), at(now), random.next_u64()).expect("one is up");
                    in_the_dark += u64::from((10_000..40_000).contains(&now));
                    after[pick.link.replica] += u64::from(now > 41_000);
                    let took = random.random_range(1..2 * deadline);
                    let ends_at = now + took.min(deadline);
                    let end = match is_dark(pick.link, now) || is_dark(pick.link, ends_at) {
                        true => (now + deadline + grace, pick.link, Ended::Silent),
                        false => (ends_at, pick.link, Ended::Replied),
                    };
                    open.push(end);
                }
            }
            assert!(in_the_dark > 10_000);
            // Two choices alone would fill it up to what the other has in flight, again and again: thousands.
            assert!((1..300).contains(&silent), "repeat with: seed {seed}; {silent} ran out of {in_the_dark}");
            assert!(after[0] > 3000 && after[1] > 3000, "both are used again: {after:?}");
            assert_eq!(router.counts().probes, 2, "repeat with: seed {seed}; the slow one was never asked");
        }
    }

    #[test]
    fn an_outcome_of_the_last_attempt_does_not_hide_that_an_earlier_one_may_have_run() {
        let (mut router, _) = up(2, RouteOptions { retry_maybe_executed: true, ..options() });
        let mut call = route();
        assert_eq!(router.judge(&mut call, 0, &lost(Executed::Maybe), at(0), 0), Next::Retry);
        router.judge(&mut call, 1, &refused(Code::InvalidArgument), at(0), 0);
        assert_eq!(call.executed(), Executed::Maybe);
    }

    /// Goal: no order of events breaks the router's sums or loses a replica. Method: random events with random
    /// moments; at the end all that is in flight ends and each replica that can be connected takes requests again.
    #[test]
    fn any_order_of_events_leaves_the_books_balanced() {
        for seed in 0..300 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (mut router, mut links) = up(3, RouteOptions { connections: 2, ..options() });
            let mut in_flight: Vec<(LinkId, Route)> = Vec::new();
            let mut now = at(0);
            for _ in 0..400 {
                now = now + Duration::from_millis(random.random_range(0..50));
                let number = random.next_u64();
                let link = links.get(random.random_range(0..links.len().max(1))).copied();
                match (random.random_range(0..10), link) {
                    (0, Some(link)) => router.handle_lost(link, now, number),
                    (1, Some(link)) => router.handle_leaving(link, Some(Code::Draining), now, number),
                    (2, Some(link)) => router.handle_credit(link),
                    (3, _) => {
                        if let Some(link) = router.poll_connect(now) {
                            if random.random_bool(0.3) {
                                router.handle_connect_failed(link, ClientError::Connect(String::new()), now, number);
                            } else {
                                assert!(router.handle_connected(link, now));
                                links.push(link);
                            }
                        }
                    }
                    (4, _) => drop(router.poll_close()),
                    (5 | 6, _) if !in_flight.is_empty() => {
                        let (link, mut call) = in_flight.swap_remove(number as usize % in_flight.len());
                        let ended = [Ended::Replied, Ended::Replied, Ended::Silent, Ended::Here];
                        router.handle_end(link, ended[random.random_range(0..4)], now);
                        if let Some(asked) = router.poll_probe(now).filter(|_| random.random_bool(0.5)) {
                            router.handle_alive(asked, now);
                        }
                        if random.random_bool(0.3) {
                            router.judge(&mut call, link.replica, &overloaded(20), now, number);
                        }
                    }
                    _ => {
                        let mut call = route();
                        if let Some(pick) = router.pick(&mut call, now, number) {
                            let replica = &router.replicas[pick.link.replica];
                            assert!(!replica.draining && replica.paused_until <= now);
                            let link = replica.links.iter().find(|link| link.id == pick.link).expect("it was picked");
                            assert!(!link.is_suspect() || !router.replicas.iter().any(Replica::is_well));
                            match random.random_bool(0.2) {
                                true => router.handle_no_credit(pick, &mut call),
                                false => in_flight.push((pick.link, call)),
                            }
                        }
                    }
                }
            }
            for (link, _) in in_flight {
                router.handle_end(link, Ended::Replied, now);
            }
            let later = now + Duration::from_secs(10);
            while let Some(link) = router.poll_connect(later) {
                assert!(router.handle_connected(link, later));
            }
            while router.poll_close().is_some() {}
            for replica in 0..3 {
                assert_eq!(router.outstanding(replica), 0, "repeat with: seed {seed}");
                assert!(router.open_links(replica) >= 1, "repeat with: seed {seed}");
            }
        }
    }
}
