//! The configuration from outside: files and settings in, values or a complete list of mistakes out.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ferry::config::file::Value;
use ferry::config::limits::{Access, SETTINGS, connections_allowed, memory, memory_total, recorder_bytes, setting};
use ferry::config::{Config, LogFormat, Machine, OtelProtocol, Place};
use proptest::prelude::*;

const MACHINE: Machine = Machine { cores: 8, nofile: 20_000, memory: 64 << 30 };

/// The configuration of a file with this text.
fn of_file(text: &str) -> Result<Config, Vec<String>> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), text).expect("it can be written");
    let shown = file.path().display().to_string();
    Config::load_on(MACHINE, Some(file.path()), &[])
        .map_err(|errors| errors.0.iter().map(|error| error.to_string().replace(&shown, "FILE")).collect())
}

fn of_sets(sets: &[&str]) -> Result<Config, Vec<String>> {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Config::load_on(MACHINE, None, &sets).map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
}

fn mistakes(result: Result<Config, Vec<String>>) -> Vec<String> {
    result.expect_err("a mistake was planted")
}

#[test]
fn without_a_file_every_default_is_the_documented_one() {
    let config = of_sets(&[]).expect("defaults contradict nothing");
    assert_eq!(config.listen, "127.0.0.1:7600".parse::<SocketAddr>().expect("an address"));
    assert_eq!(config.control, "127.0.0.1:7601".parse::<SocketAddr>().expect("an address"));
    assert_eq!(config.models, PathBuf::from("models"));
    assert_eq!(config.drain_timeout, Duration::from_secs(30));
    assert_eq!((config.threads.shards, config.threads.executors), (2, 8));
    assert_eq!((config.threads.tokenizers, config.threads.pin), (1, true));
    assert_eq!(config.frontend.connections_max, 10_000);
    assert_eq!((config.frontend.credit_requests, config.frontend.credit_bytes), (256, 64 << 20));
    assert_eq!((config.frontend.payload_bytes_max, config.frontend.output_bytes_max), (16 << 20, 4 << 20));
    assert_eq!(config.frontend.output_bytes_total_max, 1 << 30);
    assert_eq!(config.frontend.hello_timeout, Duration::from_secs(3));
    assert_eq!(config.frontend.frame_timeout, Duration::from_secs(5));
    assert_eq!(config.frontend.stall_timeout, Duration::from_secs(10));
    assert_eq!(config.frontend.idle_timeout, Duration::from_secs(300));
    assert_eq!(config.frontend.spin, Duration::ZERO);
    assert_eq!((config.queue.rows_max, config.queue.bytes_max), (65_536, 1 << 30));
    let abuse = &config.abuse;
    assert_eq!((abuse.points, abuse.points_per_second), (1000, 100));
    assert_eq!((abuse.ban, abuse.ban_loopback), (Duration::from_secs(10), false));
    assert_eq!(config.quota, ferry::config::Quota::default(), "no quota");
    let executor = &config.executor;
    assert_eq!((executor.slots, executor.threads, executor.canary_every), (2, 1, 1000));
    assert_eq!((config.log.format, config.log.level.as_str()), (LogFormat::Text, "info"));
}

#[test]
fn a_small_machine_still_gets_one_thread_of_each_kind_and_fewer_connections() {
    let config = Config::default_on(Machine { cores: 1, nofile: 1024, memory: 1 << 30 });
    assert_eq!((config.threads.shards, config.threads.executors), (1, 1));
    assert_eq!(config.frontend.connections_max, connections_allowed(1024));
    assert_eq!(connections_allowed(1024), 816, "80 % of what is allowed, in whole steps of five files");
    let many = Config::default_on(Machine { nofile: u64::MAX, ..MACHINE });
    assert_eq!(many.frontend.connections_max, 10_000);
}

#[test]
fn on_little_memory_what_may_be_held_is_less_and_still_takes_a_payload() {
    let held = |mib: u64| {
        let config = Config::default_on(Machine { memory: mib << 20, ..MACHINE });
        (config.queue.bytes_max >> 20, config.frontend.output_bytes_total_max >> 20)
    };
    assert_eq!(
        [held(1024), held(2048), held(4096), held(1 << 20)],
        [(256, 256), (512, 512), (1024, 1024), (1024, 1024)]
    );
    assert_eq!(held(8), (16, 32), "the largest payload, and 16 MiB of answers a shard");
    let parts = memory(&Config::default_on(Machine { memory: 1 << 30, ..MACHINE }), 0, 0);
    assert!(memory_total(&parts) < 800 << 20, "three quarters and the recorder: {parts:?}");
    for mib in [1, 8, 64, 500] {
        assert!(Config::load_on(Machine { memory: mib << 20, ..MACHINE }, None, &[]).is_ok(), "{mib} MiB");
    }
}

#[test]
fn every_key_says_what_it_trades_and_is_in_the_dump_with_its_default() {
    let config = Config::default_on(MACHINE);
    let dump = config.to_toml();
    for setting in SETTINGS {
        assert!(setting.about.len() > 20, "{} is not documented", setting.key);
        let last = setting.key.rsplit('.').next().expect("split gives at least one");
        assert!(dump.contains(&format!("\n{last} = {}\n", setting.read(&config))), "{} is not dumped", setting.key);
    }
    let keys: std::collections::BTreeSet<&str> = SETTINGS.iter().map(|setting| setting.key).collect();
    assert_eq!(keys.len(), SETTINGS.len(), "a key is declared twice");
}

#[test]
fn every_number_is_among_the_limits_that_are_exported() {
    let limits = Config::default_on(MACHINE).limits();
    let numbers = SETTINGS.iter().filter(|setting| bounds(setting.access).is_some()).count();
    assert_eq!(limits.len(), numbers);
    assert!(limits.contains(&("queue.rows_max".into(), 65_536)), "{limits:?}");
}

#[test]
fn the_dump_of_a_configuration_loads_to_the_same_configuration() {
    let config = of_sets(&[
        "frontend.credit_requests=512",
        "frontend.hello_timeout_ms=1500",
        "frontend.spin_us=30",
        "threads.pin=false",
        "models=some \"dir\"\\with\ttrouble",
        "log.format=json",
        "log.level=info,ferry::batcher=debug",
        "listen=[::1]:0",
    ])
    .expect("none of these is wrong");
    assert_eq!(of_file(&config.to_toml()), Ok(config));
}

#[test]
fn an_unknown_key_names_the_nearest_known_one_with_file_and_line() {
    let found = mistakes(of_file("listen = \"127.0.0.1:1\"\n\n[frontend]\ncredit_request = 5\n"));
    assert_eq!(
        found,
        ["FILE:4: unknown key frontend.credit_request; the nearest known key is frontend.credit_requests"]
    );
    let found = mistakes(of_sets(&["credit_requests=5"]));
    assert!(found[0].starts_with("--set credit_requests=5: unknown key"), "{found:?}");
    assert!(found[0].ends_with("frontend.credit_requests"), "{found:?}");
    let found = mistakes(of_file("[fronted]\nspin_us = 5\n"));
    assert_eq!(found, ["FILE:2: unknown key fronted.spin_us; the nearest known key is frontend.spin_us"]);
}

#[test]
fn all_mistakes_are_listed_in_the_order_of_the_file_and_not_only_the_first() {
    let found = mistakes(of_file(
        "models = 5\n[queue]\nrows_max = 0\nbytes = 1\n[frontend]\nspin_us = \"long\"\n[log]\nformat = \"xml\"\n",
    ));
    assert_eq!(found.len(), 5, "{found:#?}");
    assert_eq!(found[0], "FILE:1: models: expected a path, got 5");
    assert_eq!(found[1], "FILE:3: queue.rows_max: expected an integer from 1 to 1073741824, got 0");
    assert!(found[2].starts_with("FILE:4: unknown key queue.bytes"), "{}", found[2]);
    assert_eq!(found[3], "FILE:6: frontend.spin_us: expected an integer from 0 to 100000, got \"long\"");
    assert_eq!(found[4], "FILE:8: log.format: expected \"text\" or \"json\", got \"xml\"");
}

#[test]
fn a_missing_quote_does_not_hide_the_other_mistakes() {
    let found = mistakes(of_file("models = \"dir\nlisten = 7\n"));
    assert!(found.iter().any(|line| line.starts_with("FILE:1: not TOML")), "{found:#?}");
    assert!(found.iter().any(|line| line.starts_with("FILE:2: listen: expected an address")), "{found:#?}");
}

#[test]
fn a_file_that_is_not_there_is_a_mistake_and_not_the_defaults() {
    let path = std::path::Path::new("no/such/ferry.toml");
    let errors = Config::load_on(MACHINE, Some(path), &[]).expect_err("there is no such file");
    assert!(errors.to_string().starts_with("no/such/ferry.toml: cannot read it"), "{errors}");
}

#[test]
fn settings_come_after_the_file_and_the_last_one_wins() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), "[executor]\nslots = 3\n[queue]\nrows_max = 10\n").expect("it can be written");
    let sets = ["executor.slots=4".to_owned(), "executor.slots = 5".to_owned()];
    let config = Config::load_on(MACHINE, Some(file.path()), &sets).expect("none of these is wrong");
    assert_eq!((config.executor.slots, config.queue.rows_max), (5, 10));
}

#[test]
fn a_setting_without_a_value_says_how_one_looks() {
    assert!(mistakes(of_sets(&["executor.slots"]))[0].contains("expected key=value"));
}

#[test]
fn dotted_keys_and_tables_mean_the_same() {
    assert_eq!(of_file("frontend.spin_us = 7\n"), of_file("[frontend]\nspin_us = 7\n"));
    assert_eq!(of_file("frontend = { spin_us = 7 }\n"), of_file("[frontend]\nspin_us = 7\n"));
    assert_eq!(of_file("[frontend]\n"), of_file(""));
}

/// Smallest and largest value of a key, for those that are numbers.
fn bounds(access: Access) -> Option<(u64, u64)> {
    match access {
        Access::U32 { min, max, .. } => Some((min.into(), max.into())),
        Access::U64 { min, max, .. } | Access::Millis { min, max, .. } | Access::Micros { min, max, .. } => {
            Some((min, max))
        }
        Access::Count { min, max, .. } => Some((min as u64, max as u64)),
        _ => None,
    }
}

#[test]
fn every_number_is_taken_at_its_bounds_and_refused_beyond_them() {
    for setting in SETTINGS {
        let Some((min, max)) = bounds(setting.access) else { continue };
        let mut config = Config::default_on(MACHINE);
        for value in [i128::from(min), i128::from(max)] {
            assert_eq!(setting.write(&mut config, &Value::Integer(value)), Ok(()), "{} = {value}", setting.key);
            assert_eq!(setting.read(&config), value.to_string(), "{} keeps what it was given", setting.key);
        }
        for value in [i128::from(min) - 1, i128::from(max) + 1] {
            let message = setting.write(&mut config, &Value::Integer(value)).expect_err(setting.key);
            assert!(message.contains(&format!("from {min} to {max}, got {value}")), "{message}");
            assert_eq!(setting.read(&config), max.to_string(), "{} is not changed by a mistake", setting.key);
        }
    }
}

#[test]
fn knobs_that_contradict_each_other_are_refused_with_both_numbers() {
    let cases: &[(&[&str], &str)] = &[
        (
            &["frontend.credit_bytes=4096"],
            "frontend.credit_bytes must be at least frontend.payload_bytes_max (16777216)",
        ),
        (&["queue.bytes_max=4096"], "queue.bytes_max must be at least frontend.payload_bytes_max (16777216)"),
        (&["queue.cells_max=1"], "queue.cells_max must be at least queue.rows_max (65536)"),
        (&["frontend.connections_max=1"], "frontend.connections_max must be at least threads.shards (2)"),
        (
            &["frontend.output_bytes_total_max=4096"],
            "frontend.output_bytes_total_max must be at least frontend.output_bytes_max times threads.shards (8388608)",
        ),
        (&["frontend.idle_timeout_ms=1"], "frontend.idle_timeout_ms must be at least frontend.hello_timeout_ms (3000)"),
        (&["control=127.0.0.1:7600"], "listen and control must differ, both are 127.0.0.1:7600"),
    ];
    for (sets, expected) in cases {
        let found = mistakes(of_sets(sets));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].contains(expected), "{found:#?} should say: {expected}");
    }
    let together: Vec<&str> = cases.iter().flat_map(|(sets, _)| sets.iter().copied()).collect();
    assert_eq!(mistakes(of_sets(&together)).len(), cases.len(), "all contradictions are listed");
}

#[test]
fn telemetry_goes_nowhere_unless_an_endpoint_is_named_and_only_where_one_can_be() {
    let config = of_sets(&[]).expect("defaults");
    assert_eq!(config.otel.endpoint, None);
    let sets =
        ["otel.endpoint=http://[::1]:4317/", "otel.protocol=grpc", "otel.sample_ratio=0.25", "otel.service_name=a b"];
    let config = of_sets(&sets).expect("none of these is wrong");
    assert_eq!(config.otel.endpoint.as_deref(), Some("http://[::1]:4317/"));
    assert_eq!((config.otel.protocol, config.otel.sample_ratio), (OtelProtocol::Grpc, 0.25));
    assert_eq!(of_file(&config.to_toml()), Ok(config), "and is dumped so that it loads again");
    for endpoint in
        ["https://a:1", "a:4317", "http://a", "http://a:0", "http://a:1/v1/traces", "http://a b:1", "http://:1"]
    {
        let wrong = mistakes(of_sets(&[&format!("otel.endpoint={endpoint}")]));
        assert!(wrong[0].contains("otel.endpoint: expected http://HOST:PORT"), "{wrong:?}");
    }
    for share in ["1.5", "-0.1", "nan", "2", "half"] {
        let wrong = mistakes(of_sets(&[&format!("otel.sample_ratio={share}")]));
        assert!(wrong[0].contains("expected a number from 0 to 1"), "{wrong:?}");
    }
    assert!(mistakes(of_sets(&["otel.protocol=udp"]))[0].contains("\"http/protobuf\" or \"grpc\""));
}

#[test]
fn two_free_ports_do_not_contradict_each_other() {
    assert!(of_sets(&["listen=127.0.0.1:0", "control=127.0.0.1:0"]).is_ok());
}

#[test]
fn an_address_beyond_this_machine_is_refused_until_it_is_allowed_in_words() {
    for (key, addr) in [("listen", "0.0.0.0:7600"), ("control", "192.0.2.1:7601"), ("listen", "[::]:7600")] {
        let set = format!("{key}={addr}");
        let found = mistakes(of_sets(&[&set]));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with(key) && found[0].contains(addr), "{found:#?}");
        assert!(found[0].contains("allow_unauthenticated = true"), "{found:#?}");
        assert!(of_sets(&[&set, "allow_unauthenticated=true"]).is_ok());
    }
    let anywhere = ["listen=0.0.0.0:7600", "auth.tenants=a", "tls.certificate=b", "tls.key=c"];
    assert!(of_sets(&anywhere).is_ok(), "tenants who prove themselves over TLS need no such words");
    let found = mistakes(of_sets(&anywhere[..2]));
    assert!(found.len() == 1 && found[0].contains("credentials are not encrypted"), "{found:#?}");
    assert_eq!(mistakes(of_sets(&[anywhere[0], anywhere[2], anywhere[3]])).len(), 1, "TLS alone proves nobody");
    assert!(of_sets(&["listen=127.8.7.6:1"]).is_ok(), "all of 127/8 is this machine");
}

#[test]
fn memory_adds_up_and_grows_with_each_of_its_limits() {
    let config = of_sets(&["frontend.connections_max=10"]).expect("ten connections are enough for two shards");
    let parts = memory(&config, 7, 11);
    let recorder = recorder_bytes(&config);
    assert!((1 << 20..4 << 20).contains(&recorder), "some hundred bytes for each of 4096 batches: {recorder}");
    let expected = (1u64 << 30) + 10 * (16 << 20) + 10 * (4 << 20) + 7 + 11 + recorder;
    assert_eq!(memory_total(&parts), expected);
    for set in [
        "queue.bytes_max=2147483648",
        "frontend.connections_max=11",
        "frontend.output_bytes_max=8388608",
        "recorder.batches=4097",
    ] {
        let more = of_sets(&["frontend.connections_max=10", set]).expect("each of these is allowed");
        assert!(memory_total(&memory(&more, 7, 11)) > expected, "{set} must cost memory");
    }
    let less = of_sets(&["frontend.connections_max=10", "frontend.output_bytes_total_max=16777216"]).expect("allowed");
    assert_eq!(memory_total(&memory(&less, 7, 11)), expected - (24 << 20), "it bounds what all hold together");
}

#[test]
fn a_sum_too_large_to_count_does_not_wrap_to_a_small_one() {
    let config = of_sets(&["frontend.connections_max=1000000", "queue.bytes_max=17592186044416"]).expect("allowed");
    assert_eq!(memory_total(&memory(&config, u64::MAX, 0)), u64::MAX);
}

proptest! {
    /// Any text is read or refused; none makes the loader panic, and what loads is inside its bounds.
    #[test]
    fn any_text_is_a_configuration_or_a_list_of_mistakes(text in "[a-z_.=\\[\\]\"0-9 \n-]{0,200}") {
        match of_file(&text) {
            Ok(config) => prop_assert!(config.frontend.credit_requests >= 1),
            Err(found) => prop_assert!(!found.is_empty()),
        }
    }

    #[test]
    fn any_value_of_any_key_is_taken_or_refused_by_name(at in 0..SETTINGS.len(), value in ".{0,20}") {
        let key = SETTINGS[at].key;
        if let Err(found) = of_sets(&[&format!("{key}={value}")]) {
            prop_assert!(!found.is_empty());
            prop_assert!(found.iter().all(|line| !line.contains("unknown key")), "{found:?}");
        }
        prop_assert!(setting(key).is_some());
    }
}

/// Runs `ferry` and returns its exit status, standard output and standard error.
fn ferry(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("RUST_LOG", "error")
        .output()
        .expect("the binary was built for this test");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("ferry prints UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn check_json(arguments: &[&str]) -> (Option<i32>, serde_json::Value) {
    let (status, out, _) = ferry(&[&["check", "--json"], arguments].concat());
    (status, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}")))
}

fn warnings_of(value: &serde_json::Value) -> Vec<&str> {
    value["warnings"].as_array().expect("a list").iter().map(|line| line.as_str().expect("text")).collect()
}

#[test]
fn check_prints_every_limit_and_the_memory_they_add_up_to() {
    let (status, value) = check_json(&["--set", "executor.slots=3"]);
    assert_eq!((status, &value["ok"]), (Some(0), &serde_json::json!(true)), "{value}");
    for setting in SETTINGS {
        assert!(value["limits"].get(setting.key).is_some(), "{} is missing", setting.key);
    }
    assert_eq!(value["limits"]["executor.slots"], 3);
    let parts = value["memory"].as_array().expect("a list");
    let sum: u64 = parts.iter().map(|part| part["bytes"].as_u64().expect("a number")).sum();
    assert_eq!(value["memory_bytes"], sum);
    assert!(value["models"].as_array().expect("a list").iter().any(|model| model["name"] == "echo"), "{value}");
}

#[test]
fn check_warns_of_a_batch_that_callers_can_never_fill() {
    let few =
        ["--set", "frontend.connections_max=2", "--set", "frontend.credit_requests=1", "--set", "threads.shards=1"];
    let (status, value) = check_json(&few);
    assert_eq!(status, Some(0), "a warning is not a failure");
    let found = warnings_of(&value);
    assert!(found.iter().any(|line| line.contains("but callers can have at most 2 in flight")), "{found:#?}");
    let (_, value) = check_json(&["--set", "frontend.credit_requests=1"]);
    let found = warnings_of(&value);
    assert!(found.iter().any(|line| line.contains("a single caller never fills a batch")), "{found:#?}");
}

#[test]
fn check_gives_each_finding_a_code_and_the_knob_to_turn() {
    let (status, value) = check_json(&["--set", "frontend.credit_requests=1"]);
    assert_eq!(status, Some(0), "a finding is not a failure");
    let of_echo = value["findings"].as_array().expect("a list").iter().find(|finding| finding["model"] == "echo");
    let of_echo = of_echo.expect("one request in flight fills no batch");
    let [code, severity, knob] = ["code", "severity", "knob"].map(|key| of_echo[key].as_str().expect("text"));
    assert_eq!((code, severity, knob), ("rows_max_above_credit", "warning", "frontend.credit_requests"));
    let (_, out, _) = ferry(&["check", "--set", "frontend.credit_requests=1"]);
    let line = out.lines().find(|line| line.starts_with("warning: echo: ")).expect("the same for people");
    assert!(line.ends_with("[rows_max_above_credit: change frontend.credit_requests]"), "{line}");
}

#[test]
fn check_fails_where_a_right_manifest_cannot_be_served() {
    let models = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(models.path().join("half")).expect("a folder in it");
    let minilm = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/models/minilm/model.toml"));
    let half = minilm.expect("a manifest").replace("normalize = true", "normalize = true\nprecision = \"f16\"");
    std::fs::write(models.path().join("half/model.toml"), half).expect("a manifest");
    let (status, value) = check_json(&["--models", &models.path().display().to_string()]);
    assert_eq!(status, Some(1));
    assert!(value["errors"][0].as_str().expect("text").contains("computed on a GPU only"), "{value}");
}

#[test]
fn check_says_every_mistake_and_fails() {
    let (status, value) = check_json(&["--set", "queue.rows=1", "--set", "log.format=xml"]);
    assert_eq!(status, Some(1));
    assert_eq!(value["errors"].as_array().expect("a list").len(), 2, "{value}");
    let models = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(models.path().join("broken")).expect("a folder in it");
    std::fs::write(models.path().join("broken/model.toml"), "architectur = \"echo\"\n").expect("a manifest");
    let (status, out, _) = ferry(&["check", "--models", &models.path().display().to_string()]);
    assert_eq!(status, Some(1));
    assert!(out.contains("error: ") && out.contains("broken"), "{out}");
}

#[test]
fn wrong_use_is_2_and_a_configuration_that_cannot_be_served_is_78() {
    assert_eq!(ferry(&["serve", "--no-such-flag"]).0, Some(2));
    assert_eq!(ferry(&["no-such-command"]).0, Some(2));
    let (status, out, err) = ferry(&["serve", "--set", "queue.rows_max=0", "--set", "frontend.spin=1"]);
    assert_eq!((status, out.as_str()), (Some(78), ""));
    assert_eq!(err.lines().count(), 2, "{err}");
}

#[test]
fn the_thread_plan_is_printed_without_starting_anything() {
    let (status, out, err) = ferry(&["serve", "--threads", "--set", "threads.shards=3"]);
    assert_eq!((status, out.as_str()), (Some(0), ""));
    assert!(err.contains("3 shard(s)"), "{err}");
}

/// Where batches run, as it is written; and what a device changes of what was not.
#[test]
fn a_device_is_named_and_brings_defaults_of_its_own() {
    for (text, place) in [
        ("cpu", Place::Cpu),
        ("cuda", Place::Cuda(vec![0])),
        ("cuda:3", Place::Cuda(vec![3])),
        ("cuda:0,2", Place::Cuda(vec![0, 2])),
        ("sim:7", Place::Sim { seed: 7, lost_after: None }),
        ("sim:7:500", Place::Sim { seed: 7, lost_after: Some(500) }),
    ] {
        assert_eq!(Place::parse(text), Some(place.clone()));
        assert_eq!(Place::parse(&place.to_string()), Some(place));
    }
    for text in ["", "gpu", "cuda:", "cuda:x", "cuda:1,1", "sim", "sim:x", "sim:1:", "cpu:0"] {
        assert_eq!(Place::parse(text), None, "{text}");
    }
    let on = |sets: &[&str]| of_sets(sets).expect("a good configuration");
    let config = on(&["executor.device=\"cuda:0,1\""]);
    assert_eq!((config.threads.executors, config.executor.slots), (2, 3));
    let config = on(&["executor.slots=1", "executor.device=\"cuda\"", "threads.executors=5"]);
    assert_eq!((config.threads.executors, config.executor.slots), (5, 1));
    assert!(mistakes(of_sets(&["executor.device=\"gpu\""]))[0].contains("expected \"cpu\""));
}
