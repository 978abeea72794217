//! The daemon's configuration: flags, and a JSON file with the same keys, as dockerd has them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use skep_api::units::parse_duration;
use skep_api::with_causes;
use skep_engine::{ExternalRuntime, IdMap, LogConfig, RegistryConfig, StorageDriver};

/// Flags of `skep daemon`. Names are dockerd's where both have the thing.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DaemonArgs {
    /// Socket to serve the API on: unix://PATH or tcp://HOST:PORT (repeatable)
    #[arg(short = 'H', long = "host", value_name = "SOCKET")]
    pub hosts: Vec<String>,
    /// Directory of what lasts [default: /var/lib/skep]
    #[arg(long, value_name = "DIR")]
    pub data_root: Option<PathBuf>,
    /// Directory of what does not outlive a start of the host [default: /run/skep]
    #[arg(long, value_name = "DIR")]
    pub exec_root: Option<PathBuf>,
    /// File for the daemon's process id
    #[arg(short = 'p', long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// JSON file with these settings [default: /etc/skep/daemon.json, if there]
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// debug, info, warn, error or fatal [default: info]
    #[arg(short = 'l', long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Mirror of Docker Hub to ask first (repeatable)
    #[arg(long = "registry-mirror", value_name = "URL")]
    pub registry_mirrors: Vec<String>,
    /// Registry that may be spoken to without TLS (repeatable)
    #[arg(long = "insecure-registry", value_name = "HOST:PORT")]
    pub insecure_registries: Vec<String>,
    /// Pool of the bridge network: base=172.17.0.0/16,size=16
    #[arg(long = "default-address-pool", value_name = "POOL")]
    pub default_address_pools: Vec<String>,
    /// Label of this node's engine: KEY=VALUE (repeatable)
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// What makes containers' roots of layers: overlay2, btrfs or vfs [default: overlay2, vfs where that cannot be]
    #[arg(short = 's', long, value_name = "DRIVER")]
    pub storage_driver: Option<String>,
    /// Keep containers while the daemon is down (always so: accepted for dockerd's sake)
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub live_restore: Option<bool>,
    /// Cgroup below which containers have theirs [default: /skep]
    #[arg(long, value_name = "PATH")]
    pub cgroup_parent: Option<String>,
    /// Whether containers that do not say gain nothing from set-user-id programs [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub no_new_privileges: Option<bool>,
    /// Have containers' users be users of the host that own nothing: "default", or whose ids they take: USER[:GROUP]
    #[arg(long, value_name = "USER[:GROUP]")]
    pub userns_remap: Option<String>,
    /// OCI runtime beside the built-in one: NAME=PATH (repeatable)
    #[arg(long = "add-runtime", value_name = "NAME=PATH")]
    pub add_runtimes: Vec<String>,
    /// Runtime of containers that do not say [default: skep, the built-in one]
    #[arg(long, value_name = "NAME")]
    pub default_runtime: Option<String>,
    /// Whether containers on the default bridge reach each other [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub icc: Option<bool>,
    /// Log driver of containers that do not say: json-file, local, syslog, journald or none [default: json-file]
    #[arg(long, value_name = "DRIVER")]
    pub log_driver: Option<String>,
    /// Option of that log driver: NAME=VALUE (repeatable)
    #[arg(long = "log-opt", value_name = "NAME=VALUE")]
    pub log_opts: Vec<String>,
    /// Address to serve Prometheus metrics on: HOST:PORT
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_addr: Option<String>,
    /// How long the key of the tunnels to other nodes lasts, such as 12h; 0s: for ever [default: 12h]
    #[arg(long, value_name = "DURATION")]
    pub overlay_key_period: Option<String>,
    /// How often a leading manager says so, and what managers must answer within: several times as long as a packet takes
    /// between any two of them and back; the same on all [default: 50ms]
    #[arg(long, value_name = "DURATION")]
    pub raft_heartbeat: Option<String>,
    /// What carries packets between containers of two nodes: auto (the kernel's WireGuard where both have it), userspace
    /// (this program, always) or kernel (as auto, and the daemon does not start without it) [default: auto]
    #[arg(long, value_name = "WAY")]
    pub data_path: Option<String>,
    /// Ask API clients on TCP for a certificate of this CA
    #[arg(long)]
    pub tlsverify: bool,
    #[arg(long, value_name = "FILE")]
    pub tlscacert: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    pub tlscert: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    pub tlskey: Option<PathBuf>,
}

/// The same as a file; an unknown key is an error.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct ConfigFile {
    hosts: Vec<String>,
    data_root: Option<PathBuf>,
    exec_root: Option<PathBuf>,
    pidfile: Option<PathBuf>,
    log_level: Option<String>,
    registry_mirrors: Vec<String>,
    insecure_registries: Vec<String>,
    default_address_pools: Vec<PoolJson>,
    labels: Vec<String>,
    storage_driver: Option<String>,
    live_restore: Option<bool>,
    cgroup_parent: Option<String>,
    no_new_privileges: Option<bool>,
    userns_remap: Option<String>,
    runtimes: BTreeMap<String, RuntimeJson>,
    default_runtime: Option<String>,
    icc: Option<bool>,
    log_driver: Option<String>,
    log_opts: BTreeMap<String, String>,
    metrics_addr: Option<String>,
    overlay_key_period: Option<String>,
    raft_heartbeat: Option<String>,
    data_path: Option<String>,
    tlsverify: bool,
    tlscacert: Option<PathBuf>,
    tlscert: Option<PathBuf>,
    tlskey: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RuntimeJson {
    path: PathBuf,
    #[serde(default)]
    runtime_args: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct PoolJson {
    base: String,
    size: u8,
}

/// Where the API is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listener {
    Unix(PathBuf),
    Tcp(String),
}

/// TLS of the API on TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiTls {
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// The configuration, checked.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) tls: Option<ApiTls>,
    pub(crate) data_root: PathBuf,
    pub(crate) exec_root: PathBuf,
    pub(crate) pidfile: Option<PathBuf>,
    pub log_level: String,
    pub(crate) registry_mirrors: Vec<String>,
    pub(crate) insecure_registries: BTreeSet<String>,
    pub(crate) bridge: (Ipv4Addr, u8),
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) cgroup_parent: String,
    pub(crate) no_new_privileges: bool,
    pub(crate) storage: Option<StorageDriver>,
    pub(crate) id_map: Option<IdMap>,
    pub(crate) icc: bool,
    pub(crate) runtimes: BTreeMap<String, ExternalRuntime>,
    pub(crate) default_runtime: String,
    /// Of containers that do not say.
    pub(crate) log: LogConfig,
    pub(crate) metrics_addr: Option<String>,
    pub(crate) overlay_key_period: Duration,
    pub(crate) raft_heartbeat: Duration,
    pub(crate) data_path: DataPathWay,
    /// What it was made from besides the file, to read that again.
    args: Box<DaemonArgs>,
}

/// What is wrong with a configuration: everything, not only the first thing.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration file {path} cannot be used: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("the configuration is not usable:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// What is in the program itself is called so.
pub(crate) const BUILT_IN_RUNTIME: &str = "skep";

const DEFAULT_FILE: &str = "/etc/skep/daemon.json";

impl DaemonConfig {
    /// Puts flags and file together and checks all of it.
    pub fn load(args: DaemonArgs) -> Result<Self, ConfigError> {
        let given = Box::new(args.clone());
        let file = read_file(args.config_file.clone())?;
        let mut problems = Vec::new();
        let twice = |name: &str, flag: bool, file: bool| {
            (flag && file).then(|| format!("{name} is set by a flag and in the file: set it in one place"))
        };
        problems.extend(twice("data-root", args.data_root.is_some(), file.data_root.is_some()));
        problems.extend(twice("exec-root", args.exec_root.is_some(), file.exec_root.is_some()));
        problems.extend(twice("hosts", !args.hosts.is_empty(), !file.hosts.is_empty()));
        problems.extend(twice("log-level", args.log_level.is_some(), file.log_level.is_some()));
        if args.live_restore.or(file.live_restore) == Some(false) {
            problems.push("live-restore cannot be switched off: containers always outlive the daemon".into());
        }
        let log_level = args.log_level.or(file.log_level).unwrap_or_else(|| "info".into());
        if !["debug", "info", "warn", "error", "fatal", "trace"].contains(&log_level.as_str()) {
            problems.push(format!("log-level {log_level:?} is unknown: use debug, info, warn, error or fatal"));
        }
        let exec_root = args.exec_root.or(file.exec_root).unwrap_or_else(|| "/run/skep".into());
        let hosts = [args.hosts, file.hosts].concat();
        let tls = api_tls(
            args.tlsverify || file.tlsverify,
            [args.tlscacert.or(file.tlscacert), args.tlscert.or(file.tlscert), args.tlskey.or(file.tlskey)],
            &mut problems,
        );
        let listeners = listeners(&hosts, &exec_root, tls.is_some(), &mut problems);
        let pools = pools(&args.default_address_pools, &file.default_address_pools, &mut problems);
        let runtimes = runtimes(&args.add_runtimes, file.runtimes, &mut problems);
        let default_runtime = args.default_runtime.or(file.default_runtime).unwrap_or_else(|| BUILT_IN_RUNTIME.into());
        if default_runtime != BUILT_IN_RUNTIME && !runtimes.contains_key(&default_runtime) {
            problems.push(format!("default-runtime {default_runtime:?} is not known: add it by add-runtime"));
        }
        let config = Self {
            runtimes,
            default_runtime,
            listeners,
            tls,
            data_root: args.data_root.or(file.data_root).unwrap_or_else(|| "/var/lib/skep".into()),
            exec_root,
            pidfile: args.pidfile.or(file.pidfile),
            log_level: if log_level == "fatal" { "error".into() } else { log_level },
            registry_mirrors: [args.registry_mirrors, file.registry_mirrors].concat(),
            insecure_registries: args.insecure_registries.into_iter().chain(file.insecure_registries).collect(),
            bridge: pools.first().copied().unwrap_or((Ipv4Addr::new(172, 17, 0, 1), 16)),
            labels: labels(&[args.labels, file.labels].concat(), &mut problems),
            cgroup_parent: args.cgroup_parent.or(file.cgroup_parent).unwrap_or_else(|| "/skep".into()),
            no_new_privileges: args.no_new_privileges.or(file.no_new_privileges).unwrap_or(true),
            storage: storage(args.storage_driver.or(file.storage_driver), &mut problems),
            id_map: id_map(args.userns_remap.or(file.userns_remap), &mut problems),
            icc: args.icc.or(file.icc).unwrap_or(true),
            log: log(args.log_driver.or(file.log_driver), &args.log_opts, file.log_opts, &mut problems),
            metrics_addr: args.metrics_addr.or(file.metrics_addr),
            overlay_key_period: key_period(args.overlay_key_period.or(file.overlay_key_period), &mut problems),
            raft_heartbeat: raft_heartbeat(args.raft_heartbeat.or(file.raft_heartbeat), &mut problems),
            data_path: data_path(args.data_path.or(file.data_path), &mut problems),
            args: given,
        };
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid(problems)) }
    }
}

impl DaemonConfig {
    /// The runtime that goes by a name; none is the built-in one, which also answers to docker's.
    pub(crate) fn runtime(&self, name: &str) -> Result<Option<ExternalRuntime>, String> {
        let name = if name.is_empty() { &self.default_runtime } else { name };
        match (self.runtimes.get(name), name) {
            (Some(runtime), _) => Ok(Some(runtime.clone())),
            (None, BUILT_IN_RUNTIME | "runc" | "io.containerd.runc.v2") => Ok(None),
            (None, _) => Err(format!("unknown or invalid runtime name: {name}")),
        }
    }

    /// The same flags with what the file says now.
    pub(crate) fn reload(&self) -> Result<Self, ConfigError> {
        Self::load((*self.args).clone())
    }

    pub(crate) fn registries(&self) -> RegistryConfig {
        RegistryConfig { mirrors: self.registry_mirrors.clone(), insecure: self.insecure_registries.clone() }
    }

    /// What is different in `next` and comes into force with a restart alone.
    pub(crate) fn needing_restart(&self, next: &Self) -> Vec<&'static str> {
        let settings = [
            ("hosts", self.listeners != next.listeners),
            ("tls", self.tls != next.tls),
            ("data-root", self.data_root != next.data_root),
            ("exec-root", self.exec_root != next.exec_root),
            ("pidfile", self.pidfile != next.pidfile),
            ("default-address-pools", self.bridge != next.bridge),
            ("labels", self.labels != next.labels),
            ("cgroup-parent", self.cgroup_parent != next.cgroup_parent),
            ("no-new-privileges", self.no_new_privileges != next.no_new_privileges),
            ("runtimes", self.runtimes != next.runtimes || self.default_runtime != next.default_runtime),
            ("storage-driver", self.storage != next.storage),
            ("userns-remap", self.id_map != next.id_map),
            ("icc", self.icc != next.icc),
            ("log-driver and log-opts", self.log != next.log),
            ("metrics-addr", self.metrics_addr != next.metrics_addr),
            ("overlay-key-period", self.overlay_key_period != next.overlay_key_period),
            ("raft-heartbeat", self.raft_heartbeat != next.raft_heartbeat),
            ("data-path", self.data_path != next.data_path),
        ];
        settings.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
    }
}

/// Flags and file together; every program must be there.
fn runtimes(
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
        } else if !path.is_absolute() || !path.is_file() {
            problems.push(format!("runtime {name:?}: {} is no program: write its whole path", path.display()));
        } else {
            runtimes.insert(name.clone(), ExternalRuntime { name, path, args });
        }
    }
    runtimes
}

fn log(
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

fn storage(asked: Option<String>, problems: &mut Vec<String>) -> Option<StorageDriver> {
    let asked = asked.filter(|name| !name.is_empty())?;
    let driver = StorageDriver::from_name(&asked);
    if driver.is_none() {
        problems.push(format!("storage-driver {asked:?} is not supported: use overlay2, btrfs or vfs"));
    }
    driver
}

fn id_map(asked: Option<String>, problems: &mut Vec<String>) -> Option<IdMap> {
    let asked = asked.filter(|text| !text.is_empty())?;
    let map = IdMap::resolve(&asked).map_err(|error| problems.push(format!("userns-remap: {}", with_causes(&error))));
    map.ok()
}

/// What carries packets between containers of two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPathWay {
    Auto,
    Userspace,
    Kernel,
}

fn data_path(asked: Option<String>, problems: &mut Vec<String>) -> DataPathWay {
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
fn key_period(asked: Option<String>, problems: &mut Vec<String>) -> Duration {
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

fn raft_heartbeat(asked: Option<String>, problems: &mut Vec<String>) -> Duration {
    const USUAL: Duration = Duration::from_millis(50);
    const USABLE: std::ops::RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(5);
    let Some(text) = asked else { return USUAL };
    parse_duration(&text).filter(|period| USABLE.contains(period)).unwrap_or_else(|| {
        problems.push(format!("raft-heartbeat {text:?} cannot be used: write a duration from 20ms to 5s"));
        USUAL
    })
}

fn read_file(path: Option<PathBuf>) -> Result<ConfigFile, ConfigError> {
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

fn api_tls(verify: bool, files: [Option<PathBuf>; 3], problems: &mut Vec<String>) -> Option<ApiTls> {
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

fn listeners(hosts: &[String], exec_root: &std::path::Path, tls: bool, problems: &mut Vec<String>) -> Vec<Listener> {
    if hosts.is_empty() {
        return vec![Listener::Unix(exec_root.join("skep.sock"))];
    }
    let mut listeners = Vec::new();
    for host in hosts {
        if let Some(path) = host.strip_prefix("unix://") {
            listeners.push(Listener::Unix(path.into()));
        } else if let Some(addr) = host.strip_prefix("tcp://") {
            let loopback = addr.starts_with("127.") || addr.starts_with("localhost:") || addr.starts_with("[::1]");
            if !tls && !loopback {
                problems.push(format!(
                    "host {host} would let anyone on the network take over this machine: set tlsverify, tlscacert, \
                     tlscert and tlskey, or listen on 127.0.0.1"
                ));
            }
            listeners.push(Listener::Tcp(addr.to_owned()));
        } else {
            problems.push(format!("host {host:?} cannot be read: write unix://PATH or tcp://HOST:PORT"));
        }
    }
    listeners
}

fn pools(flags: &[String], file: &[PoolJson], problems: &mut Vec<String>) -> Vec<(Ipv4Addr, u8)> {
    let mut pools = Vec::new();
    let texts = flags.iter().cloned().chain(file.iter().map(|pool| format!("base={},size={}", pool.base, pool.size)));
    for text in texts {
        let field = |name: &str| text.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let base = field("base").and_then(|base| base.split_once('/')).and_then(|(addr, _)| addr.parse().ok());
        let size = field("size").and_then(|size| size.parse::<u8>().ok()).filter(|size| (8..=29).contains(size));
        match (base, size) {
            (Some(base), Some(size)) => {
                let base: Ipv4Addr = base;
                pools.push((Ipv4Addr::from(u32::from(base) + 1), size));
            }
            _ => {
                problems.push(format!("default-address-pool {text:?} cannot be read: write base=172.30.0.0/16,size=24"))
            }
        }
    }
    pools
}

fn labels(texts: &[String], problems: &mut Vec<String>) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for text in texts {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => drop(labels.insert(key.to_owned(), value.to_owned())),
            _ => problems.push(format!("label {text:?} cannot be read: write KEY=VALUE")),
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_told_at_once_and_unknown_keys_are_named() {
        let args = DaemonArgs {
            hosts: vec!["tcp://0.0.0.0:2375".into(), "http://x".into()],
            storage_driver: Some("zfs".into()),
            labels: vec!["x".into()],
            raft_heartbeat: Some("1ms".into()),
            ..DaemonArgs::default()
        };
        let text = DaemonConfig::load(args).unwrap_err().to_string();
        for part in ["take over this machine", "http://x", "zfs", "KEY=VALUE", "from 20ms to 5s"] {
            assert!(text.contains(part), "{text}");
        }
        let error = serde_json::from_str::<ConfigFile>(r#"{"colour":"red"}"#).unwrap_err().to_string();
        assert!(error.contains("colour"), "{error}");
    }

    #[test]
    fn the_file_is_read_again_and_what_needs_a_restart_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.json");
        std::fs::write(&path, "\n").unwrap();
        let args = DaemonArgs { config_file: Some(path.clone()), ..DaemonArgs::default() };
        let first = DaemonConfig::load(args).unwrap();
        std::fs::write(&path, r#"{"insecure-registries": ["r:5000"], "log-level": "debug", "labels": ["a=b"]}"#)
            .unwrap();
        let next = first.reload().unwrap();
        assert!(next.registries().insecure.contains("r:5000"));
        assert_eq!((next.log_level.as_str(), first.needing_restart(&next)), ("debug", vec!["labels"]));
        std::fs::write(&path, "{").unwrap();
        assert!(first.reload().unwrap_err().to_string().contains("daemon.json"));
    }

    #[test]
    fn a_pool_becomes_the_bridge_network() {
        let args =
            DaemonArgs { default_address_pools: vec!["base=10.99.0.0/16,size=24".into()], ..DaemonArgs::default() };
        assert_eq!(DaemonConfig::load(args).unwrap().bridge, (Ipv4Addr::new(10, 99, 0, 1), 24));
    }
}
