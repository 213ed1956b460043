//! Who may connect: certificates and tenants as they are now, shared by the shards and replaced while they run.
//!
//! Always true
//! - A connection keeps what it proved to be; when tenants change it is asked again whether that still holds.
//! - Nothing here is touched by a request: looked at when a connection comes, when it says hello, and a few times a second.
//! - Who says nothing keeps nobody out: of those that have not said hello one makes room for who comes ([`makes_room`]).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;

use super::abuse::{Bans, Rules, Source};
use super::bucket::Bucket;
use super::connection::Connection;
use super::session::Fatal;
use super::state::State;
use super::tls::Tls;
use crate::telemetry::TurnedAway;
use crate::tenants::{Day, Identity, Tenants};
use crate::vocab::{Code, Moment};

/// Connections that have not said hello, of a shard. For one more, one of them has to go.
const STRANGERS_MAX: usize = 256;
/// So long a stranger keeps its place against one that has no better right to it: time for the round trips of a far peer.
const STRANGERS_CHANCE: Duration = Duration::from_secs(1);
/// Handshakes that a shard begins at once, and in each second after that.
const HANDSHAKES: f64 = 200.0;
/// Lines in the log about peers that cannot connect, at once and in each second after that.
const COMPLAINTS: f64 = 10.0;
const COMPLAINTS_PER_SECOND: f64 = 0.2;
/// Ten failures to prove who it is are forgiven an address, and one more every ten seconds. Also one of this machine: guesses are no
/// cheaper there.
const FAILURES: Rules = Rules { size: 1000, per_second: 100, ban: Duration::from_secs(30), ban_loopback: true };

pub(super) fn complaints() -> Bucket {
    Bucket::new(COMPLAINTS, COMPLAINTS_PER_SECOND, Moment::ZERO)
}

pub(super) fn handshakes() -> Bucket {
    Bucket::new(HANDSHAKES, HANDSHAKES, Moment::ZERO)
}

/// What is in force.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// None: connections are not encrypted.
    pub tls: Option<Arc<ServerConfig>>,
    /// None: nobody has to prove anything.
    pub tenants: Option<Arc<Tenants>>,
}

/// What is in force, for all shards.
#[derive(Debug)]
pub struct SharedAccess {
    current: Mutex<Arc<Access>>,
    /// Raised with each change.
    generation: AtomicU64,
    /// By which credentials are judged: said by whoever looks at the wall clock, which no room that decides does.
    today: AtomicI64,
    /// Addresses that failed to prove who they are.
    failures: Bans,
    /// The same on the control port: who fails there is kept out there.
    control_failures: Bans,
}

/// What a token comes to on the control port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    Of(Identity),
    Nothing,
    /// The address failed too often: what it shows is not looked at for a while.
    Banned,
}

impl SharedAccess {
    pub fn new(access: Access, today: Day) -> SharedAccess {
        SharedAccess {
            current: Mutex::new(Arc::new(access)),
            generation: AtomicU64::new(1),
            today: AtomicI64::new(today.0),
            failures: Bans::new(FAILURES),
            control_failures: Bans::new(FAILURES),
        }
    }

    /// Who shows this token on the control port.
    pub fn prove(&self, token: &[u8], addr: IpAddr, now: Moment) -> Proof {
        if !self.control_failures.admits(addr, now) {
            return Proof::Banned;
        }
        match self.current().tenants.as_ref().and_then(|tenants| tenants.by_token(token, self.today())) {
            Some(identity) => Proof::Of(identity),
            None => {
                // Whoever shows none is asked for one, as every browser is at first.
                if !token.is_empty() && self.control_failures.strike(addr, now) {
                    tracing::warn!(ban = ?FAILURES.ban, "an address failed too often to prove who it is on the control port");
                }
                Proof::Nothing
            }
        }
    }

    pub fn today(&self) -> Day {
        Day(self.today.load(Ordering::Relaxed))
    }

    pub fn set_today(&self, today: Day) {
        self.today.store(today.0, Ordering::Relaxed);
    }

    pub fn current(&self) -> Arc<Access> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub fn replace(&self, access: Access) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(access);
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Who says hello with this token, or with a certificate of these names. Why not is not said: an answer is the same whatever was wrong.
pub fn identify(tenants: &Tenants, token: &[u8], uris: &[String], named: &str, today: Day) -> Result<Identity, Fatal> {
    let by_certificate = tenants.by_certificate(uris.iter().map(String::as_str));
    let identity = match token.is_empty() {
        true => by_certificate,
        // Whoever shows both is to be one.
        false => tenants
            .by_token(token, today)
            .filter(|identity| by_certificate.is_none_or(|other| other.tenant == identity.tenant)),
    };
    let Some(identity) = identity else {
        return Err(Fatal { code: Code::Unauthenticated, message: "the credentials are not valid here".into() });
    };
    if !named.is_empty() && named != &*identity.tenant {
        let message = "the hello names another tenant than the credentials are of".into();
        return Err(Fatal { code: Code::PermissionDenied, message });
    }
    Ok(identity)
}

/// A connection that has not said hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stranger {
    at: u32,
    source: Option<Source>,
    since: Moment,
}

/// Who of a full house of strangers goes for one more from `newcomer`; `None` when nobody does, and it is the newcomer that has to.
///
/// - An address that holds the most places gives one up to another that would still hold fewer, at once: its oldest.
/// - Among equals it is the oldest of all, once it has had its chance: whoever fills the house from many addresses has to fill it
///   anew each second.
fn makes_room(strangers: &[Stranger], newcomer: Option<Source>, now: Moment) -> Option<u32> {
    let mut places: HashMap<Option<Source>, usize> = HashMap::new();
    strangers.iter().for_each(|stranger| *places.entry(stranger.source).or_default() += 1);
    let of = |source: &Option<Source>| places.get(source).copied().unwrap_or(0);
    let most = places.values().copied().max()?;
    let oldest = |among: &dyn Fn(&&Stranger) -> bool| strangers.iter().filter(among).min_by_key(|s| (s.since, s.at));
    if of(&newcomer) + 1 < most {
        return oldest(&|stranger| of(&stranger.source) == most).map(|stranger| stranger.at);
    }
    oldest(&|_| true).filter(|stranger| stranger.since + STRANGERS_CHANCE <= now).map(|stranger| stranger.at)
}

impl State {
    /// Whether a hello has to prove who says it.
    pub fn wants_proof(&self) -> bool {
        self.options.access.as_ref().is_some_and(|access| access.current().tenants.is_some())
    }

    /// Somebody failed to prove who it is, which is noted by where it comes from.
    pub fn proof_failed(&mut self, at: u32, now: Moment) {
        self.metrics().authenticated(false);
        if let (Some(access), Some(addr)) = (&self.options.access, self.connections[at as usize].addr)
            && access.failures.strike(addr, now)
            && self.complaints.take(1.0, now)
        {
            tracing::warn!(ban = ?FAILURES.ban, "an address failed too often to prove who it is: it is not listened to for a while");
        }
    }

    /// A connection came: whether it is let in. It is encrypted from here on where that is asked for.
    pub fn welcome(&mut self, connection: &mut Connection, now: Moment) -> bool {
        let Some(shared) = &self.options.access else { return true };
        let access = shared.current();
        if connection.addr.is_some_and(|addr| !shared.failures.admits(addr, now)) {
            self.metrics().turned_away(TurnedAway::Banned);
            return false;
        }
        // Last: nobody goes for one that is turned away itself.
        if !self.make_room_for(connection.addr.map(Source::of), now) {
            self.metrics().turned_away(TurnedAway::Strangers);
            return false;
        }
        if let Some(config) = &access.tls {
            match Tls::new(Arc::clone(config)) {
                Ok(tls) => connection.tls = Some(Box::new(tls)),
                Err(fault) => {
                    tracing::error!(reason = fault.0, "no TLS session could be made");
                    return false;
                }
            }
        }
        true
    }

    /// Has a stranger go, if there is no room for one more. False when none does.
    fn make_room_for(&mut self, newcomer: Option<Source>, now: Moment) -> bool {
        if self.strangers.len() < STRANGERS_MAX {
            return true;
        }
        let stranger = |at: &u32| {
            let connection = &self.connections[*at as usize];
            Stranger { at: *at, source: connection.addr.map(Source::of), since: connection.since }
        };
        let strangers: Vec<Stranger> = self.strangers.iter().map(stranger).collect();
        let Some(at) = makes_room(&strangers, newcomer, now) else { return false };
        self.metrics().turned_away(TurnedAway::Displaced);
        self.greeted(at);
        // Without a word: it has said none, and may not understand any before its handshake.
        self.connections[at as usize].close();
        self.recount(at);
        true
    }

    /// A connection that was let in is a stranger until it says hello.
    pub fn meet(&mut self, at: u32) {
        if self.options.access.is_some() {
            self.connections[at as usize].is_stranger = true;
            self.strangers.push(at);
        }
    }

    /// A connection is no stranger any more: it has said hello, or leaves.
    pub fn greeted(&mut self, at: u32) {
        let connection = &mut self.connections[at as usize];
        if std::mem::take(&mut connection.is_stranger) {
            self.strangers.retain(|stranger| *stranger != at);
        }
    }

    /// Ends connections whose credentials were revoked or have expired, once tenants have changed or a day has.
    pub(super) fn recheck_identities(&mut self, now: Moment) {
        let Some(access) = &self.options.access else { return };
        let seen = (access.generation(), access.today());
        if std::mem::replace(&mut self.access_seen, seen) == seen {
            return;
        }
        let Some(tenants) = access.current().tenants.clone() else { return };
        let gone = |connection: &Connection| {
            connection.identity.as_ref().is_some_and(|identity| !tenants.still(identity, seen.1))
        };
        let revoked: Vec<u32> =
            self.connections.iter().filter(|(_, connection)| gone(connection)).map(|(at, _)| at as u32).collect();
        for at in revoked {
            let message = "the credentials are not valid any more".into();
            self.fail(at, &Fatal { code: Code::Unauthenticated, message }, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenants::token_of;

    #[test]
    fn credentials_say_who_it_is_and_wrong_ones_all_get_one_answer() {
        let (token, sha256) = token_of("t", &[1; 32]);
        let text = format!(
            "[tenant.a]\nroles = [\"infer\"]\ntokens = [{{ id = \"t\", sha256 = \"{sha256}\" }}]\ncertificates = [\"x:a\"]\n\
             [tenant.b]\nroles = [\"infer\"]\ncertificates = [\"x:b\"]\n"
        );
        let tenants = Tenants::parse(&text).expect("sound");
        let uris = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let who = |token: &str, names: &[&str], named: &str| {
            identify(&tenants, token.as_bytes(), &uris(names), named, Day(0))
                .map(|identity| identity.tenant.to_string())
        };
        assert_eq!(who(&token, &[], "").expect("its token"), "a");
        assert_eq!(who(&token, &[], "a").expect("its token"), "a");
        assert_eq!(who("", &["x:b"], "").expect("its certificate"), "b");
        assert_eq!(who(&token, &["x:a"], "").expect("both"), "a");
        let refused = |token: &str, names: &[&str], named: &str| {
            let Fatal { code, message } = who(token, names, named).expect_err("not them");
            (code, message)
        };
        let uniform = (Code::Unauthenticated, "the credentials are not valid here".to_owned());
        for (token, names) in [
            ("", &[] as &[&str]),
            ("ferry_t_x", &[]),
            ("ferry_u_x", &[]),
            ("x", &["x:a"]),
            (&token, &["x:b"]),
            ("", &["x:c"]),
        ] {
            assert_eq!(refused(token, names, ""), uniform);
        }
        assert_eq!(refused(&token, &[], "b").0, Code::PermissionDenied);
    }

    fn second(at: u64) -> Moment {
        Moment(at * 1_000_000_000)
    }

    /// Strangers by the last number of their address, each a nanosecond younger than the one before.
    fn house(of: impl IntoIterator<Item = u8>) -> Vec<Stranger> {
        let stranger = |(at, number): (usize, u8)| Stranger {
            at: at as u32,
            source: Some(Source::of(source(number))),
            since: Moment(at as u64),
        };
        of.into_iter().enumerate().map(stranger).collect()
    }

    #[test]
    fn an_address_that_fills_the_house_gives_a_place_to_any_other_at_once() {
        let goes = |of: &[u8], newcomer: u8, now| {
            makes_room(&house(of.iter().copied()), Some(Source::of(source(newcomer))), now)
        };
        let soon = Moment(100);
        assert_eq!(goes(&[2, 1, 1, 1], 3, soon), Some(1), "the oldest of the one with most");
        assert_eq!(goes(&[2, 1, 1, 1], 2, soon), Some(1), "also for one that is there already and has less");
        assert_eq!(goes(&[2, 2, 1, 1], 3, soon), Some(0), "of two with most the oldest");
        // It would hold as many as who gives: then who was first stays, as long as it has its chance.
        assert_eq!(goes(&[1, 1, 2], 2, soon), None);
        assert_eq!(goes(&[2, 1, 1, 1], 1, soon), None, "its own places are all it can take");
        assert_eq!(goes(&[1, 2, 3, 4], 5, soon), None);
        // And then the oldest goes, whoever it is.
        let chance = Moment::ZERO + STRANGERS_CHANCE;
        assert_eq!(goes(&[2, 1, 1, 1], 1, chance), Some(0));
        assert_eq!(goes(&[1, 2, 3, 4], 5, chance), Some(0));
        assert_eq!(goes(&[1, 2, 3, 4], 5, Moment(chance.nanos() - 1)), None);
        assert_eq!(makes_room(&[], None, chance), None);
        // Nobody knows where it comes from: an address like any other.
        assert_eq!(makes_room(&house([1, 1]), None, soon), Some(0));
    }

    #[test]
    fn a_house_is_never_fuller_than_it_may_be_and_the_books_stay_right() {
        use crate::frontend::{Catalog, Options};
        use crate::mailbox::mailbox;
        use crate::telemetry::Telemetry;
        let access = Some(Arc::new(SharedAccess::new(Access::default(), Day(0))));
        let options = Options { access, ..Options::unbounded() };
        let telemetry = Telemetry::new(&[], 1, 1);
        let mut state = State::new(0, options, Arc::new(Catalog::new(&[])), telemetry, mailbox(1).0, None);
        let come = |state: &mut State, number: u8, now: Moment| {
            let mut connection = Connection::new(-1, now);
            connection.addr = Some(source(number));
            state.welcome(&mut connection, now).then(|| {
                let at = state.connections.insert(connection) as u32;
                state.meet(at);
                assert!(state.strangers.len() <= STRANGERS_MAX);
                assert_eq!(state.audit(), Ok(()));
                at
            })
        };
        let silent: Vec<u32> =
            (0..STRANGERS_MAX).map(|_| come(&mut state, 1, second(1)).expect("there is room")).collect();
        assert_eq!(come(&mut state, 1, second(1)), None, "no more of that address for now");
        let honest = come(&mut state, 2, second(1)).expect("another address is let in");
        assert!(state.connections[silent[0] as usize].phase == crate::frontend::connection::Phase::Closed);
        state.greeted(honest);
        state.remove(silent[0]);
        assert_eq!((state.strangers.len(), state.audit()), (STRANGERS_MAX - 1, Ok(())));
        let younger = Moment(second(1).nanos() + 1);
        assert!(come(&mut state, 1, younger).is_some(), "who said hello leaves its place");
        // Another second, and the address may replace its own.
        assert!(come(&mut state, 1, second(2)).is_some());
        assert!(state.connections[silent[1] as usize].phase == crate::frontend::connection::Phase::Closed);
        let counted = |why: &str| {
            let line = format!("ferry_turned_away_total{{why=\"{why}\"}} ");
            let page = state.telemetry.encode();
            page.lines().find_map(|text| text.strip_prefix(&line)?.parse::<u32>().ok()).expect("exported")
        };
        assert_eq!((counted("strangers"), counted("displaced")), (1, 2));
    }

    fn source(n: u8) -> std::net::IpAddr {
        [127, 0, 0, n].into()
    }

    #[test]
    fn who_fails_too_often_is_banned_for_a_while_and_nobody_else() {
        let guard = Bans::new(FAILURES);
        assert!((0..10).all(|_| !guard.strike(source(1), second(1))));
        assert!(guard.admits(source(1), second(1)));
        assert!(guard.strike(source(1), second(1)));
        assert!(!guard.admits(source(1), second(1)) && guard.admits(source(2), second(1)));
        assert!(!guard.admits(source(1), second(30)) && guard.admits(source(1), second(31)));
        // Three came back meanwhile, no more.
        assert!((0..3).all(|_| !guard.strike(source(1), second(31))));
        assert!(guard.strike(source(1), second(31)));
    }
}
