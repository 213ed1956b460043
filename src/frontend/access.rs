//! Who may connect: certificates and tenants as they are now, shared by the shards and replaced while they run.
//!
//! Always true
//! - A connection keeps what it proved to be; when tenants change it is asked again whether that still holds.
//! - Nothing here is touched by a request: looked at when a connection comes, when it says hello, and a few times a second.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ServerConfig;

use super::session::Fatal;
use crate::tenants::{Day, Identity, Tenants};
use crate::vocab::Code;

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
}

impl SharedAccess {
    pub fn new(access: Access, today: Day) -> SharedAccess {
        SharedAccess {
            current: Mutex::new(Arc::new(access)),
            generation: AtomicU64::new(1),
            today: AtomicI64::new(today.0),
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
}
