//! The daemon's configuration: flags, and a JSON file with the same keys, as dockerd has them.

mod args;
mod containers;
mod fixed;
mod networks;
mod values;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use skep_api::IpSubnet;
use skep_api::generic_resource::GenericResource;
use skep_engine::{ExternalRuntime, IdMap, LogConfig, Proxies, RegistryConfig, StorageDriver};

pub use self::args::DaemonArgs;
pub(crate) use self::containers::ContainerSettings;
pub(crate) use self::containers::ulimit;
use self::networks::NetworkSettings;
use self::values::{
    api_tls, data_path, generic_resources, id_map, key_period, labels, listeners, log, raft_heartbeat, read_file,
    runtimes, storage,
};

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

/// What carries packets between containers of two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPathWay {
    Auto,
    Userspace,
    Kernel,
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
    /// Whether the log is written as JSON.
    pub log_is_json: bool,
    pub(crate) registries: RegistryConfig,
    pub(crate) networks: NetworkSettings,
    pub(crate) containers: ContainerSettings,
    /// Who may use the Unix sockets, beside root.
    pub(crate) group: Option<String>,
    pub(crate) advertise_addr: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) generic_resources: Vec<GenericResource>,
    pub(crate) cgroup_parent: String,
    pub(crate) no_new_privileges: bool,
    pub(crate) storage: Option<StorageDriver>,
    pub(crate) id_map: Option<IdMap>,
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
        fixed::check(&args, &file, &mut problems);
        let networks = NetworkSettings::read(&args, &file, &mut problems);
        let containers = ContainerSettings::read(&args, &file, &mut problems);
        let registries = registries(&args, &file, &mut problems);
        let usual_level = if args.debug || file.debug { "debug" } else { "info" };
        let log_level = args.log_level.or(file.log_level).unwrap_or_else(|| usual_level.into());
        if !["debug", "info", "warn", "error", "fatal", "trace"].contains(&log_level.as_str()) {
            problems.push(format!("log-level {log_level:?} is unknown: use debug, info, warn, error or fatal"));
        }
        let exec_root = args.exec_root.or(file.exec_root).unwrap_or_else(|| "/run/skep".into());
        let hosts = [args.hosts, file.hosts].concat();
        // Said, not left out: whoever does so means it.
        let forced = args.fixed.tls == Some(false) || file.others.get("tls") == Some(&serde_json::Value::Bool(false));
        let tls = api_tls(
            args.tlsverify.unwrap_or(file.tlsverify),
            [args.tlscacert.or(file.tlscacert), args.tlscert.or(file.tlscert), args.tlskey.or(file.tlskey)],
            &mut problems,
        );
        let listeners = listeners(&hosts, &exec_root, tls.is_some() || forced, &mut problems);
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
            log_is_json: is_json(args.log_format.or(file.log_format), &mut problems),
            log_level: if log_level == "fatal" { "error".into() } else { log_level },
            registries,
            networks,
            containers,
            group: args.group.or(file.group),
            advertise_addr: args.swarm_default_advertise_addr.or(file.swarm_default_advertise_addr).unwrap_or_default(),
            labels: labels(&[args.labels, file.labels].concat(), &mut problems),
            generic_resources: generic_resources(
                &[args.node_generic_resources, file.node_generic_resources].concat(),
                &mut problems,
            ),
            cgroup_parent: args.cgroup_parent.or(file.cgroup_parent).unwrap_or_else(|| "/skep".into()),
            no_new_privileges: args.no_new_privileges.or(file.no_new_privileges).unwrap_or(true),
            storage: storage(args.storage_driver.or(file.storage_driver), &mut problems),
            id_map: id_map(args.userns_remap.or(file.userns_remap), &mut problems),
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

    /// What is different in `next` and comes into force with a restart alone.
    pub(crate) fn needing_restart(&self, next: &Self) -> Vec<&'static str> {
        let settings = [
            ("hosts", self.listeners != next.listeners),
            ("tls", self.tls != next.tls),
            ("data-root", self.data_root != next.data_root),
            ("exec-root", self.exec_root != next.exec_root),
            ("pidfile", self.pidfile != next.pidfile),
            ("log-format", self.log_is_json != next.log_is_json),
            ("networks (bip, mtu, default-address-pools and so on)", self.networks != next.networks),
            ("defaults of containers (dns, default-ulimits and so on)", self.containers != next.containers),
            ("group", self.group != next.group),
            ("swarm-default-advertise-addr", self.advertise_addr != next.advertise_addr),
            ("labels", self.labels != next.labels),
            ("node-generic-resources", self.generic_resources != next.generic_resources),
            ("cgroup-parent", self.cgroup_parent != next.cgroup_parent),
            ("no-new-privileges", self.no_new_privileges != next.no_new_privileges),
            ("runtimes", self.runtimes != next.runtimes || self.default_runtime != next.default_runtime),
            ("storage-driver", self.storage != next.storage),
            ("userns-remap", self.id_map != next.id_map),
            ("log-driver and log-opts", self.log != next.log),
            ("metrics-addr", self.metrics_addr != next.metrics_addr),
            ("overlay-key-period", self.overlay_key_period != next.overlay_key_period),
            ("raft-heartbeat", self.raft_heartbeat != next.raft_heartbeat),
            ("data-path", self.data_path != next.data_path),
        ];
        settings.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
    }
}

/// Whether the log's format is JSON.
fn is_json(format: Option<String>, problems: &mut Vec<String>) -> bool {
    match format.as_deref() {
        None | Some("" | "text") => false,
        Some("json") => true,
        Some(other) => {
            problems.push(format!("log-format {other:?} is unknown: use text or json"));
            false
        }
    }
}

/// How registries are asked.
fn registries(args: &DaemonArgs, file: &args::ConfigFile, problems: &mut Vec<String>) -> RegistryConfig {
    let usual = RegistryConfig::default();
    let proxy = |flag: &Option<String>, file: &Option<String>| flag.clone().or_else(|| file.clone());
    let insecure: Vec<_> = args.insecure_registries.iter().chain(&file.insecure_registries).collect();
    let registries = RegistryConfig {
        mirrors: [&args.registry_mirrors[..], &file.registry_mirrors].concat(),
        insecure: insecure
            .iter()
            .filter(|name| name.parse::<IpSubnet>().is_err())
            .map(|name| (*name).clone())
            .collect(),
        insecure_subnets: insecure.iter().filter_map(|name| name.parse().ok()).collect(),
        proxies: Proxies {
            http: proxy(&args.http_proxy, &file.proxies.http_proxy),
            https: proxy(&args.https_proxy, &file.proxies.https_proxy),
            none_for: proxy(&args.no_proxy, &file.proxies.no_proxy),
        },
        downloads_at_once: args
            .max_concurrent_downloads
            .or(file.max_concurrent_downloads)
            .unwrap_or(usual.downloads_at_once),
        uploads_at_once: args.max_concurrent_uploads.or(file.max_concurrent_uploads).unwrap_or(usual.uploads_at_once),
    };
    if registries.downloads_at_once == 0 || registries.uploads_at_once == 0 {
        problems.push("max-concurrent-downloads and -uploads are at least 1".into());
    }
    registries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_told_at_once() {
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
    }

    #[test]
    fn what_is_said_on_purpose_is_done() {
        let load = |tls| {
            let mut args = DaemonArgs { hosts: vec!["0.0.0.0:2375".into()], ..DaemonArgs::default() };
            args.fixed.tls = tls;
            args.add_runtimes = vec!["other=sh".into()];
            DaemonConfig::load(args)
        };
        assert!(load(None).unwrap_err().to_string().contains("tls=false"));
        let config = load(Some(false)).unwrap();
        assert_eq!(config.listeners, [Listener::Tcp("0.0.0.0:2375".into())]);
        assert!(config.runtimes["other"].path.ends_with("bin/sh"), "{:?}", config.runtimes);
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
        assert!(next.registries.insecure.contains("r:5000"));
        assert_eq!((next.log_level.as_str(), first.needing_restart(&next)), ("debug", vec!["labels"]));
        std::fs::write(&path, "{").unwrap();
        assert!(first.reload().unwrap_err().to_string().contains("daemon.json"));
    }
}
