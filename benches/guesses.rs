//! Whether the time that a refused token takes says what was wrong with it: Welch's t over interleaved tries of two kinds, as dudect does
//! (Reparaz, Balasch, Verbauwhede: "Dude, is my code constant time?", 2017), without the slowest tenth of each.
//!
//!     cargo bench --bench guesses                a hundred thousand tries of each kind; `cargo test --benches` makes a few
//!
//! |t| beyond 4.5 is a difference that can be told from noise; how large it is stands beside it. The first line is what measuring itself adds,
//! the last the control, a comparison that ends at the first byte that differs: it has to be found.

use std::hint::black_box;
use std::time::Duration;

use ferry::clock;
use ferry::tenants::{Day, Tenants, token_of};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn main() {
    // As cargo says when it measures.
    let tries = if std::env::args().any(|argument| argument == "--bench") { 100_000 } else { 200 };
    let (right, right_hash) = token_of("search-01", &[7; 32]);
    let (old, old_hash) = token_of("search-02", &[9; 32]);
    let text = format!(
        "[tenant.search]\nroles = [\"infer\"]\ntokens = [\n{{ id = \"search-01\", sha256 = \"{right_hash}\" }},\n\
         {{ id = \"search-02\", sha256 = \"{old_hash}\", expires = \"2020-01-01\" }},\n]\n"
    );
    let tenants = Tenants::parse(&text).expect("well formed");
    let today = Day::of_unix(Duration::from_secs(1_800_000_000));
    let refused = |token: &str| assert!(black_box(tenants.by_token(black_box(token.as_bytes()), today)).is_none());
    let tail = |token: &str, keep: usize| {
        let mut token = token.to_owned();
        let end = token.len();
        let at = end - 64 + keep;
        let other = if token.as_bytes()[at] == b'0' { "1" } else { "0" };
        token.replace_range(at..at + 1, other);
        token
    };
    let (first, last, unknown) = (tail(&right, 0), tail(&right, 63), right.replace("search-01", "nobody-01"));
    println!("{:52} {:>8} {:>9} {:>9}", "", "t", "ns", "ns apart");
    for (what, a, b) in [
        ("the same token twice: what measuring adds", &first, &first),
        ("wrong in its first digit, wrong in its last", &first, &last),
        ("a known id with a wrong secret, an unknown id", &first, &unknown),
        ("a wrong secret, one that has expired", &first, &old),
    ] {
        tell(what, compare(tries, || refused(a), || refused(b)));
    }
    let naive = |token: &str| assert!(!black_box(token.bytes().zip(right.bytes()).all(|(a, b)| black_box(a) == b)));
    tell("control: ends at the first digit that differs", compare(tries, || naive(&first), || naive(&last)));
}

fn tell(what: &str, (t, mean, apart): (f64, f64, f64)) {
    println!("{what:52} {t:8.1} {mean:9.1} {apart:9.1}");
}

/// Welch's t, the mean of the first kind and how much longer the second takes, in ns.
fn compare(tries: usize, a: impl Fn(), b: impl Fn()) -> (f64, f64, f64) {
    let mut rng = SmallRng::seed_from_u64(5);
    let mut times: [Vec<f64>; 2] = [Vec::with_capacity(tries), Vec::with_capacity(tries)];
    while times.iter().any(|times| times.len() < tries) {
        let kind = usize::from(rng.random_bool(0.5));
        let begin = clock::now();
        if kind == 0 {
            a()
        } else {
            b()
        }
        times[kind].push(clock::now().since(begin).as_nanos() as f64);
    }
    let [(first, of_first), (second, of_second)] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times.truncate(times.len() * 9 / 10);
        let count = times.len() as f64;
        let mean = times.iter().sum::<f64>() / count;
        let spread = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
        (mean, spread / count)
    });
    ((second - first) / (of_first + of_second).sqrt().max(1e-9), first, second - first)
}
