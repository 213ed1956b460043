//! Who may ask, and as whom: tenants, their tokens, certificates and roles, from one file.
//!
//! ```toml
//! [tenant.search]
//! roles = ["infer"]                          # infer, observe, admin
//! tokens = [{ id = "a1", sha256 = "…", expires = "2027-01-31" }]
//! certificates = ["spiffe://corp/search"]    # exact URIs among a client certificate's subject alternative names
//!
//! [tenant.search.quota]                      # instead of the configuration's [quota]; what is left out has no bound
//! requests_per_second = 500
//! ```
//!
//! Pure: text in, a directory out; the date is an argument.
//!
//! Always true
//! - A secret is here only as its SHA-256. Tokens are random, so a fast hash is as good as a slow one, and cannot be used to keep
//!   the server busy.
//! - No token id and no certificate means two tenants; a tenant has at most [`TOKENS_MAX`] tokens, so that one can replace the other.
//! - A token that is unknown, wrong, or expired takes the same steps and gets the same answer.
//!
//! Elsewhere: files and when they are read again (server.rs), who asks (frontend/session.rs), too many failures (frontend/abuse.rs).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::quota::QuotaSpec;

/// Live tokens of a tenant: the old one and the one that replaces it.
pub const TOKENS_MAX: usize = 2;
/// Bytes of a tenant's name, as on the wire.
pub const NAME_MAX: usize = 128;
/// Characters of a token's id.
const ID_MAX: usize = 32;
/// Bytes of a token's secret part.
pub const SECRET_BYTES: usize = 32;

/// What somebody may do. Numbers are bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Run models.
    Infer = 1,
    /// Read counters.
    Observe = 2,
    /// Change how the server works.
    Admin = 4,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Infer, Role::Observe, Role::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Role::Infer => "infer",
            Role::Observe => "observe",
            Role::Admin => "admin",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    pub const ALL: Roles = Roles(7);

    pub fn with(self, role: Role) -> Roles {
        Roles(self.0 | role as u8)
    }

    pub fn has(self, role: Role) -> bool {
        self.0 & role as u8 != 0
    }
}

/// What somebody proved to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub tenant: Arc<str>,
    pub roles: Roles,
    credential: Credential,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Credential {
    Token { id: String, sha256: [u8; 32] },
    Certificate(String),
}

/// A day, in days since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day(pub i64);

impl Day {
    /// From `YYYY-MM-DD`.
    fn parse(text: &str) -> Option<Day> {
        let mut parts = text.split('-');
        let mut number = |digits: usize| {
            let part =
                parts.next().filter(|part| part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit()))?;
            part.parse::<i64>().ok()
        };
        let (year, month, day) = (number(4)?, number(2)?, number(2)?);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days = [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let length = *days.get(usize::try_from(month - 1).ok()?)?;
        if parts.next().is_some() || !(1..=length).contains(&day) {
            return None;
        }
        // Years since 1970, and the leap days before this one.
        let before = year - 1;
        let leaps = before / 4 - before / 100 + before / 400 - (1969 / 4 - 1969 / 100 + 1969 / 400);
        Some(Day((year - 1970) * 365 + leaps + days[..month as usize - 1].iter().sum::<i64>() + day - 1))
    }

    /// The day of a time since 1970.
    pub fn of_unix(time: std::time::Duration) -> Day {
        Day((time.as_secs() / 86_400) as i64)
    }
}

#[derive(Debug)]
struct Token {
    tenant: usize,
    sha256: [u8; 32],
    /// The last day on which it is taken.
    expires: Option<Day>,
}

#[derive(Debug)]
struct Tenant {
    name: Arc<str>,
    roles: Roles,
    quota: Option<QuotaSpec>,
}

/// All tenants of a file.
#[derive(Debug, Default)]
pub struct Tenants {
    tenants: Vec<Tenant>,
    tokens: HashMap<String, Token>,
    certificates: HashMap<String, usize>,
}

/// Why a file was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantsError(pub String);

impl fmt::Display for TenantsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TenantsError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenFile {
    #[serde(default)]
    tenant: BTreeMap<String, WrittenTenant>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenTenant {
    roles: Vec<String>,
    #[serde(default)]
    tokens: Vec<WrittenToken>,
    #[serde(default)]
    certificates: Vec<String>,
    quota: Option<QuotaSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenToken {
    id: String,
    sha256: String,
    expires: Option<String>,
}

impl Tenants {
    /// Reads a file's text. An error says where and what: nothing of the file is taken then.
    pub fn parse(text: &str) -> Result<Tenants, TenantsError> {
        let written: WrittenFile = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            // The library's own rendering shows the line, which may hold a hash; the message does not.
            TenantsError(format!("line {line}: {}", error.message().trim()))
        })?;
        let mut tenants = Tenants::default();
        for (name, tenant) in written.tenant {
            let failed = |what: String| TenantsError(format!("tenant {name:?}: {what}"));
            tenants.add(&name, tenant).map_err(failed)?;
        }
        if tenants.tenants.is_empty() {
            return Err(TenantsError("expected at least one [tenant.NAME]: with none nobody could ask".into()));
        }
        Ok(tenants)
    }

    fn add(&mut self, name: &str, written: WrittenTenant) -> Result<(), String> {
        if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
            return Err(format!("expected a name of 1 to {NAME_MAX} bytes without control characters"));
        }
        let mut roles = Roles::default();
        for role in &written.roles {
            let known = Role::ALL.into_iter().find(|known| known.name() == role);
            roles.0 |= known.ok_or_else(|| format!("expected roles among infer, observe, admin, got {role:?}"))? as u8;
        }
        if roles == Roles::default() {
            return Err("expected at least one role: infer, observe, admin".into());
        }
        if written.tokens.len() > TOKENS_MAX {
            return Err(format!("expected at most {TOKENS_MAX} tokens, got {}", written.tokens.len()));
        }
        if written.tokens.is_empty() && written.certificates.is_empty() {
            return Err("expected a token or a certificate: with neither nobody is this tenant".into());
        }
        if let Some(quota) = &written.quota {
            quota.check().map_err(|error| format!("quota: {error}"))?;
        }
        let tenant = self.tenants.len();
        for token in written.tokens {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if token.id.is_empty() || token.id.len() > ID_MAX || !token.id.chars().all(good) {
                return Err(format!(
                    "expected token ids of 1 to {ID_MAX} characters of a-z, 0-9 and -, got {:?}",
                    token.id
                ));
            }
            let sha256 = from_hex(&token.sha256)
                .ok_or_else(|| format!("token {}: expected sha256 as 64 hexadecimal digits", token.id))?;
            let day = |text: &String| {
                Day::parse(text)
                    .ok_or_else(|| format!("token {}: expected expires as YYYY-MM-DD, got {text:?}", token.id))
            };
            let expires = token.expires.as_ref().map(day).transpose()?;
            if self.tokens.insert(token.id.clone(), Token { tenant, sha256, expires }).is_some() {
                return Err(format!("token id {} is used twice in this file", token.id));
            }
        }
        for uri in written.certificates {
            if !uri.contains(':') {
                return Err(format!("expected certificates as URIs such as spiffe://corp/search, got {uri:?}"));
            }
            if self.certificates.insert(uri.clone(), tenant).is_some() {
                return Err(format!("certificate {uri} is named twice in this file"));
            }
        }
        self.tenants.push(Tenant { name: name.into(), roles, quota: written.quota });
        Ok(())
    }

    /// Whether some tenant proves itself by a token.
    pub fn have_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    pub fn have_certificates(&self) -> bool {
        !self.certificates.is_empty()
    }

    /// The quotas of those that have one of their own, for [`crate::quota::Quotas::set_own`].
    pub fn quotas(&self) -> HashMap<String, QuotaSpec> {
        let own = |tenant: &Tenant| Some((tenant.name.to_string(), tenant.quota?));
        self.tenants.iter().filter_map(own).collect()
    }

    pub fn len(&self) -> usize {
        self.tenants.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }

    /// Who has this token today.
    pub fn by_token(&self, token: &[u8], today: Day) -> Option<Identity> {
        let (id, secret) = split(token).unwrap_or(("", &[]));
        let known = self.tokens.get(id);
        // Also of an id that is not known: what takes its time is done in any case.
        let sha256: [u8; 32] = Sha256::digest(secret).into();
        let equal = sha256.ct_eq(known.map_or(&[0; 32], |known| &known.sha256));
        let known = known.filter(|known| known.expires.is_none_or(|last| today <= last))?;
        if !bool::from(equal) {
            return None;
        }
        Some(self.identity(known.tenant, Credential::Token { id: id.to_owned(), sha256 }))
    }

    /// Who has a certificate with one of these names. `None` also where they are of two tenants.
    pub fn by_certificate<'a>(&self, uris: impl Iterator<Item = &'a str>) -> Option<Identity> {
        let mut found: Option<(usize, &str)> = None;
        for uri in uris {
            let Some(tenant) = self.certificates.get(uri) else { continue };
            if found.is_some_and(|(other, _)| other != *tenant) {
                return None;
            }
            found = Some((*tenant, uri));
        }
        let (tenant, uri) = found?;
        Some(self.identity(tenant, Credential::Certificate(uri.to_owned())))
    }

    /// Whether somebody who proved to be this, perhaps by an older file, still is, with the same roles.
    pub fn still(&self, identity: &Identity, today: Day) -> bool {
        let tenant = match &identity.credential {
            Credential::Token { id, sha256 } => self
                .tokens
                .get(id)
                .filter(|token| token.sha256 == *sha256 && token.expires.is_none_or(|last| today <= last))
                .map(|token| token.tenant),
            Credential::Certificate(uri) => self.certificates.get(uri).copied(),
        };
        tenant.is_some_and(|at| {
            let tenant = &self.tenants[at];
            tenant.name == identity.tenant && tenant.roles == identity.roles
        })
    }

    fn identity(&self, tenant: usize, credential: Credential) -> Identity {
        let Tenant { name, roles, .. } = &self.tenants[tenant];
        Identity { tenant: Arc::clone(name), roles: *roles, credential }
    }
}

/// A token's text, `ferry_ID_HEX`, and the SHA-256 of its secret part that belongs into the file.
pub fn token_of(id: &str, secret: &[u8; SECRET_BYTES]) -> (String, String) {
    let hex = to_hex(secret);
    let sha256: [u8; 32] = Sha256::digest(hex.as_bytes()).into();
    (format!("ferry_{id}_{hex}"), to_hex(&sha256))
}

/// The id and the secret part of a token.
fn split(token: &[u8]) -> Option<(&str, &[u8])> {
    let rest = token.strip_prefix(b"ferry_")?;
    let at = rest.iter().position(|byte| *byte == b'_')?;
    let id = std::str::from_utf8(&rest[..at]).ok().filter(|id| id.len() <= ID_MAX)?;
    Some((id, &rest[at + 1..]))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digit = |byte: u8| (byte as char).to_digit(16);
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (pair, byte) in text.as_bytes().chunks_exact(2).zip(&mut bytes) {
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TODAY: Day = Day(20_783); // 2026-11-26

    fn file(id: &str, expires: &str) -> (String, String) {
        let (token, sha256) = token_of(id, &[7; 32]);
        let text = format!(
            "[tenant.search]\nroles = [\"infer\", \"observe\"]\n\
             tokens = [{{ id = \"{id}\", sha256 = \"{sha256}\", expires = \"{expires}\" }}]\n\
             [tenant.ads]\nroles = [\"admin\"]\ncertificates = [\"spiffe://corp/ads\"]\n"
        );
        (text, token)
    }

    #[test]
    fn a_token_is_its_tenants_until_its_last_day_and_nobodys_otherwise() {
        let (text, token) = file("a1", "2026-11-26");
        let tenants = Tenants::parse(&text).expect("sound");
        let identity = tenants.by_token(token.as_bytes(), TODAY).expect("its token");
        assert_eq!(&*identity.tenant, "search");
        assert!(
            identity.roles.has(Role::Infer) && identity.roles.has(Role::Observe) && !identity.roles.has(Role::Admin)
        );
        assert_eq!(tenants.by_token(token.as_bytes(), Day(TODAY.0 + 1)), None, "the day after its last");
        let wrong = |token: &str| assert_eq!(tenants.by_token(token.as_bytes(), TODAY), None, "{token}");
        wrong("");
        wrong("ferry_a1_");
        wrong(&token[..token.len() - 1]);
        wrong(&token.replace("a1", "a2"));
        wrong(&token.to_uppercase());
        wrong(&format!("{token} "));
        assert_eq!(tenants.by_token(&[0xFF; 600], TODAY), None);
    }

    #[test]
    fn a_tenants_quota_is_written_beside_its_tokens() {
        let text = |quota: &str| {
            format!(
                "[tenant.a]\nroles = [\"infer\"]\ncertificates = [\"spiffe://x/a\"]\n[tenant.a.quota]\n{quota}\n\
                 [tenant.b]\nroles = [\"infer\"]\ncertificates = [\"spiffe://x/b\"]\n"
            )
        };
        let quotas = Tenants::parse(&text("rows_per_second = 7")).expect("sound").quotas();
        let expected = QuotaSpec { rows_per_second: 7, ..QuotaSpec::default() };
        assert_eq!((quotas.get("a"), quotas.get("b")), (Some(&expected), None));
        let error = |quota: &str| Tenants::parse(&text(quota)).expect_err("a mistake").0;
        let expected = "tenant \"a\": quota: rows_per_second: expected at most 1000000000, got 2000000000";
        assert_eq!(error("rows_per_second = 2000000000"), expected);
        assert!(error("rows = 7").contains("unknown field `rows`"));
    }

    #[test]
    fn a_certificate_is_its_tenants_by_one_exact_name() {
        let text = "[tenant.a]\nroles = [\"infer\"]\ncertificates = [\"spiffe://x/a\", \"spiffe://x/a2\"]\n\
                    [tenant.b]\nroles = [\"infer\"]\ncertificates = [\"spiffe://x/b\"]\n";
        let tenants = Tenants::parse(text).expect("sound");
        let tenant =
            |uris: &[&str]| tenants.by_certificate(uris.iter().copied()).map(|identity| identity.tenant.to_string());
        assert_eq!(tenant(&["spiffe://x/a"]), Some("a".into()));
        assert_eq!(tenant(&["https://else", "spiffe://x/b"]), Some("b".into()));
        assert_eq!(tenant(&["spiffe://x/a", "spiffe://x/a2"]), Some("a".into()));
        assert_eq!(tenant(&["spiffe://x/a", "spiffe://x/b"]), None, "of two tenants");
        assert_eq!(tenant(&["spiffe://x/A", "spiffe://x/a/", ""]), None);
        assert_eq!(tenant(&[]), None);
    }

    #[test]
    fn who_was_revoked_changed_or_has_expired_is_not_still_who_it_was() {
        let (text, token) = file("a1", "2026-11-26");
        let tenants = Tenants::parse(&text).expect("sound");
        let identity = tenants.by_token(token.as_bytes(), TODAY).expect("its token");
        assert!(tenants.still(&identity, TODAY));
        assert!(!tenants.still(&identity, Day(TODAY.0 + 1)));
        let still = |text: &str| Tenants::parse(text).expect("sound").still(&identity, TODAY);
        assert!(!still(&text.replace("search", "find")), "renamed");
        assert!(!still(&text.replace("\"infer\", ", "")), "fewer roles");
        assert!(!still(&file("a2", "2026-11-26").0), "another token");
        assert!(!still(&text.replace("a1", "a9")), "revoked");
        let ads = tenants.by_certificate(["spiffe://corp/ads"].into_iter()).expect("named");
        assert!(tenants.still(&ads, TODAY));
        assert!(!Tenants::parse(&text.replace("corp/ads", "corp/other")).expect("sound").still(&ads, TODAY));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_said_without_its_hashes() {
        let (text, _) = file("a1", "2026-11-26");
        let sha256 = text.split('"').find(|part| part.len() == 64).expect("a hash").to_owned();
        let table: &[(&str, &str, &str)] = &[
            ("roles = [\"admin\"]", "roles = [\"root\"]", "infer, observe, admin"),
            ("roles = [\"admin\"]", "roles = []", "at least one role"),
            ("roles = [\"admin\"]", "role = [\"admin\"]", "unknown field `role`"),
            ("certificates = [\"spiffe://corp/ads\"]", "", "a token or a certificate"),
            ("spiffe://corp/ads", "ads", "as URIs"),
            ("\"a1\"", "\"A1\"", "token ids"),
            (&sha256, &sha256[1..], "64 hexadecimal digits"),
            ("2026-11-26", "2026-11-31", "YYYY-MM-DD"),
            ("[tenant.ads]", "[tenant.ads", "line 4"),
        ];
        for (from, to, expected) in table {
            let error = Tenants::parse(&text.replace(from, to)).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains(&sha256[1..]), "{error}");
        }
        assert!(Tenants::parse("").is_err());
        let three =
            (0..3).map(|n| format!("{{ id = \"t{n}\", sha256 = \"{sha256}\" }}")).collect::<Vec<_>>().join(", ");
        let error = Tenants::parse(&format!("[tenant.x]\nroles = [\"infer\"]\ntokens = [{three}]")).expect_err("three");
        assert!(error.to_string().contains("at most 2 tokens, got 3"), "{error}");
        let twice = format!("{}{}", text, text.replace("tenant.", "tenant.x").replace("corp/ads", "corp/x"));
        assert!(Tenants::parse(&twice).expect_err("one id").to_string().contains("used twice"));
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (text, day) in [("1970-01-01", 0), ("2000-02-29", 11_016), ("2026-11-26", TODAY.0), ("2100-03-01", 47_541)]
        {
            assert_eq!(Day::parse(text), Some(Day(day)), "{text}");
        }
        for text in ["2100-02-29", "2026-13-01", "2026-00-01", "2026-1-01", "2026-01-01-", "26-01-01", "", "x"] {
            assert_eq!(Day::parse(text), None, "{text}");
        }
        assert_eq!(Day::of_unix(std::time::Duration::from_secs(86_399)), Day(0));
    }

    proptest! {
        #[test]
        fn no_other_secret_is_taken_for_a_token(secret in prop::array::uniform32(any::<u8>()), garbage in ".{0,80}") {
            let (text, token) = file("a1", "2030-01-01");
            let tenants = Tenants::parse(&text).expect("sound");
            let (other, _) = token_of("a1", &secret);
            prop_assert_eq!(tenants.by_token(other.as_bytes(), TODAY).is_some(), other == token);
            prop_assert_eq!(tenants.by_token(garbage.as_bytes(), TODAY), None);
            let _ = Tenants::parse(&garbage);
        }
    }
}
