//! Reads what single settings say.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use skep_api::generic_resource::{GenericResource, check_of_node};
use skep_api::units::parse_duration;
use skep_api::with_causes;
use skep_engine::{ExternalRuntime, IdMap, LogConfig, StorageDriver};

use super::args::{ConfigFile, RuntimeJson};
use super::{ApiTls, BUILT_IN_RUNTIME, ConfigError, DEFAULT_FILE, DataPathWay, Listener};

/// Flags and file together; every program must be there.
pub(super) fn runtimes(
    flags: &[String],
    file: BTreeMap<String, RuntimeJson>,
    problems: &mut Vec<String>,
) -> BTreeMap<String, ExternalRuntime> {
    let mut all: Vec<(String, PathBuf, Vec<String>)> =
        file.into_iter().map(|(name, runtime)| (name, runtime.path, runtime.runtime_args)).collect();
    for text in flags {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                all.push((name.into(), path.into(), Vec::new()));
            }
            _ => problems.push(format!("add-runtime {text:?} cannot be read: write NAME=PATH")),
        }
    }
    let mut runtimes = BTreeMap::new();
    for (name, path, args) in all {
        if name == BUILT_IN_RUNTIME {
            problems.push(format!("runtime {name:?} is the built-in one: choose another name"));
        } else if let Some(path) = program(&path) {
            runtimes.insert(name.clone(), ExternalRuntime { name, path, args });
        } else {
            let path = path.display();
            problems
                .push(format!("runtime {name:?}: {path} is no program: write its whole path, or one that PATH has"));
        }
    }
    runtimes
}

pub(super) fn log(
    driver: Option<String>,
    flags: &[String],
    file: BTreeMap<String, String>,
    problems: &mut Vec<String>,
) -> LogConfig {
    let mut options = file;
    for text in flags {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => drop(options.insert(key.to_owned(), value.to_owned())),
            _ => problems.push(format!("log-opt {text:?} cannot be read: write NAME=VALUE")),
        }
    }
    LogConfig::parse(&driver.unwrap_or_default(), &options, &LogConfig::default()).unwrap_or_else(|error| {
        problems.push(error.to_string());
        LogConfig::default()
    })
}

pub(super) fn storage(asked: Option<String>, problems: &mut Vec<String>) -> Option<StorageDriver> {
    let asked = asked.filter(|name| !name.is_empty())?;
    let driver = StorageDriver::from_name(&asked);
    if driver.is_none() {
        problems.push(format!("storage-driver {asked:?} is not supported: use overlay2, btrfs or vfs"));
    }
    driver
}

pub(super) fn id_map(asked: Option<String>, problems: &mut Vec<String>) -> Option<IdMap> {
    let asked = asked.filter(|text| !text.is_empty())?;
    let map = IdMap::resolve(&asked).map_err(|error| problems.push(format!("userns-remap: {}", with_causes(&error))));
    map.ok()
}

pub(super) fn data_path(asked: Option<String>, problems: &mut Vec<String>) -> DataPathWay {
    match asked.as_deref().unwrap_or_default() {
        "" | "auto" => DataPathWay::Auto,
        "userspace" => DataPathWay::Userspace,
        "kernel" => DataPathWay::Kernel,
        other => {
            problems.push(format!("data-path {other:?} is not known: use auto, userspace or kernel"));
            DataPathWay::Auto
        }
    }
}

/// Peers need a moment to hear of a key before it is used.
pub(super) fn key_period(asked: Option<String>, problems: &mut Vec<String>) -> Duration {
    const USUAL: Duration = Duration::from_secs(12 * 3600);
    const SHORTEST: Duration = Duration::from_secs(4);
    let Some(text) = asked else { return USUAL };
    match parse_duration(&text) {
        Some(period) if period.is_zero() || period >= SHORTEST => period,
        _ => {
            problems.push(format!(
                "overlay-key-period {text:?} cannot be used: write a duration of 4s or more such as 12h, or 0s for ever"
            ));
            USUAL
        }
    }
}

pub(super) fn raft_heartbeat(asked: Option<String>, problems: &mut Vec<String>) -> Duration {
    const USUAL: Duration = Duration::from_millis(50);
    const USABLE: std::ops::RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(5);
    let Some(text) = asked else { return USUAL };
    parse_duration(&text).filter(|period| USABLE.contains(period)).unwrap_or_else(|| {
        problems.push(format!("raft-heartbeat {text:?} cannot be used: write a duration from 20ms to 5s"));
        USUAL
    })
}

pub(super) fn read_file(path: Option<PathBuf>) -> Result<ConfigFile, ConfigError> {
    let wanted = path.is_some();
    let path = path.unwrap_or_else(|| DEFAULT_FILE.into());
    let failed = |reason: String| ConfigError::File { path: path.clone(), reason };
    match std::fs::read(&path) {
        // An empty file says nothing.
        Ok(bytes) if bytes.trim_ascii().is_empty() => Ok(ConfigFile::default()),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !wanted => Ok(ConfigFile::default()),
        Err(error) => Err(failed(error.to_string())),
    }
}

pub(super) fn api_tls(verify: bool, files: [Option<PathBuf>; 3], problems: &mut Vec<String>) -> Option<ApiTls> {
    match files {
        [Some(ca), Some(cert), Some(key)] if verify => Some(ApiTls { ca, cert, key }),
        _ if verify => {
            problems.push("tlsverify needs tlscacert, tlscert and tlskey".into());
            None
        }
        [None, None, None] => None,
        _ => {
            problems.push("tlscacert, tlscert and tlskey do nothing without tlsverify: add it".into());
            None
        }
    }
}

/// Where a program lies: the path itself, or for a name alone the first that PATH has.
fn program(path: &Path) -> Option<PathBuf> {
    if path.is_absolute() {
        return path.is_file().then(|| path.to_owned());
    }
    let is_name = path.components().count() == 1;
    let dirs = std::env::var_os("PATH").filter(|_| is_name)?;
    std::env::split_paths(&dirs).map(|dir| dir.join(path)).find(|path| path.is_absolute() && path.is_file())
}

/// What follows `tcp://`, which may be left out before an address with a port.
fn tcp_address(host: &str) -> Option<&str> {
    host.strip_prefix("tcp://").or_else(|| host.parse::<SocketAddr>().is_ok().then_some(host))
}

/// `protected`: nobody but those who are meant to reaches what listens, or whoever configured it says so.
pub(super) fn listeners(
    hosts: &[String],
    exec_root: &Path,
    protected: bool,
    problems: &mut Vec<String>,
) -> Vec<Listener> {
    if hosts.is_empty() {
        return vec![Listener::Unix(exec_root.join("skep.sock"))];
    }
    let mut listeners = Vec::new();
    for host in hosts {
        if let Some(path) = host.strip_prefix("unix://") {
            listeners.push(Listener::Unix(path.into()));
        } else if let Some(addr) = tcp_address(host) {
            let loopback = addr.starts_with("127.") || addr.starts_with("localhost:") || addr.starts_with("[::1]");
            if !protected && !loopback {
                problems.push(format!(
                    "host {host} would let anyone on the network take over this machine: set tlsverify, tlscacert, \
                     tlscert and tlskey, listen on 127.0.0.1, or say tls=false if nobody else is on that network"
                ));
            }
            listeners.push(Listener::Tcp(addr.to_owned()));
        } else {
            problems.push(format!("host {host:?} cannot be read: write unix://PATH or tcp://HOST:PORT"));
        }
    }
    listeners
}

pub(super) fn labels(texts: &[String], problems: &mut Vec<String>) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for text in texts {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => drop(labels.insert(key.to_owned(), value.to_owned())),
            _ => problems.push(format!("label {text:?} cannot be read: write KEY=VALUE")),
        }
    }
    labels
}

pub(super) fn generic_resources(texts: &[String], problems: &mut Vec<String>) -> Vec<GenericResource> {
    let read = texts.iter().map(|text| text.parse());
    let checked = read.collect::<Result<Vec<_>, _>>().and_then(|all| check_of_node(&all).map(|()| all));
    checked.unwrap_or_else(|error| {
        problems.push(error.to_string());
        Vec::new()
    })
}
