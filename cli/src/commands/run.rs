//! What a container is made from: the options of `skep run` and `skep create`.

use std::path::PathBuf;

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use super::values::{HealthArgs, environment, file_lines, members, mount, network_place, optional_size, size, ulimit};
use crate::client::escape;
use crate::streams::Streams;

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    /// Print help (`-h` is the host's name, as in docker)
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    #[arg(long, default_value = "")]
    name: String,
    /// Hand our input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Join only stdin, stdout or stderr (repeatable)
    #[arg(short, long, value_name = "STREAM", ignore_case = true)]
    attach: Vec<Attached>,
    /// Remove it when it has ended
    #[arg(long)]
    pub(crate) rm: bool,
    /// NAME=value, or the name of one of our own variables (repeatable)
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// A file with a variable on each line
    #[arg(long = "env-file", value_name = "FILE")]
    env_files: Vec<PathBuf>,
    #[arg(short, long = "label", value_name = "KEY[=VALUE]")]
    labels: Vec<String>,
    /// A file with a label on each line
    #[arg(long = "label-file", value_name = "FILE")]
    label_files: Vec<PathBuf>,
    #[arg(long = "annotation", value_name = "KEY=VALUE")]
    annotations: Vec<String>,
    /// Write the container's id to a file, which must not be there yet
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// NAME:TARGET[:ro], /HOST/PATH:TARGET[:ro], or TARGET alone (repeatable)
    #[arg(short, long = "volume", value_name = "[SOURCE:]TARGET[:OPTIONS]")]
    volumes: Vec<String>,
    /// type=bind|volume|tmpfs,source=…,target=…[,readonly] (repeatable)
    #[arg(long = "mount", value_name = "MOUNT")]
    mounts: Vec<String>,
    /// CONTAINER[:ro]: its volumes and binds, too
    #[arg(long, value_name = "CONTAINER")]
    volumes_from: Vec<String>,
    #[arg(long, value_name = "DRIVER", default_value = "")]
    volume_driver: String,
    #[arg(long, value_name = "TARGET[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// [[IP:]HOST:]CONTAINER[/PROTOCOL] (repeatable)
    #[arg(short, long, value_name = "PORT")]
    publish: Vec<String>,
    /// Publish all ports that the image says it serves
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// A port that it serves (repeatable)
    #[arg(long, value_name = "PORT[/PROTOCOL]")]
    expose: Vec<String>,
    /// bridge, host, none, container:NAME, a network's name, or
    /// name=NETWORK[,alias=NAME][,ip=ADDRESS][,ip6=ADDRESS][,mac-address=MAC][,link-local-ip=ADDRESS]
    /// [,driver-opt=NAME=VALUE][,gw-priority=N] (repeatable)
    #[arg(long = "network", visible_alias = "net", value_name = "NETWORK")]
    networks: Vec<String>,
    #[arg(long = "network-alias", visible_alias = "net-alias", value_name = "NAME")]
    aliases: Vec<String>,
    #[arg(long, value_name = "ADDRESS", default_value = "")]
    ip: String,
    #[arg(long, value_name = "ADDRESS", default_value = "")]
    ip6: String,
    #[arg(long, value_name = "ADDRESS", default_value = "")]
    mac_address: String,
    /// Of 169.254.0.0/16, beside the other (repeatable)
    #[arg(long = "link-local-ip", value_name = "ADDRESS")]
    link_local: Vec<String>,
    #[arg(short = 'h', long, default_value = "")]
    hostname: String,
    #[arg(long, default_value = "")]
    domainname: String,
    /// CONTAINER[:ALIAS]: find another container by a name of its own (repeatable)
    #[arg(long = "link", value_name = "CONTAINER[:ALIAS]")]
    links: Vec<String>,
    /// NAME:IP for its /etc/hosts (repeatable)
    #[arg(long = "add-host", value_name = "NAME:IP")]
    hosts: Vec<String>,
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    dns_option: Vec<String>,
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    #[arg(short, long, value_name = "USER[:GROUP]", default_value = "")]
    user: String,
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    #[arg(short, long, value_name = "DIR", default_value = "")]
    workdir: String,
    #[arg(long)]
    entrypoint: Option<String>,
    /// no, always, unless-stopped, or on-failure[:N]
    #[arg(long, default_value = "no")]
    restart: String,
    #[command(flatten)]
    idle: IdleArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    health: HealthArgs,
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// Run a small init as its first process
    #[arg(long)]
    init: bool,
    #[arg(long)]
    read_only: bool,
    /// All capabilities and devices
    #[arg(long)]
    privileged: bool,
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// no-new-privileges, seccomp=FILE|unconfined, apparmor=PROFILE|unconfined, systempaths=unconfined
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// HOST[:CONTAINER[:rwm]], or a name that a vendor gave, such as nvidia.com/gpu=all (repeatable)
    #[arg(long = "device", value_name = "DEVICE")]
    devices: Vec<String>,
    /// A rule of the devices cgroup, such as c 1:3 r (repeatable)
    #[arg(long = "device-cgroup-rule", value_name = "RULE")]
    device_rules: Vec<String>,
    /// Not supported: the daemon says why
    #[arg(long, value_name = "REQUEST")]
    gpus: Option<String>,
    /// host or container:NAME
    #[arg(long, default_value = "")]
    pid: String,
    /// private, shareable, host, none or container:NAME
    #[arg(long, default_value = "")]
    ipc: String,
    /// host
    #[arg(long, default_value = "")]
    uts: String,
    /// host
    #[arg(long, default_value = "")]
    userns: String,
    /// private or host
    #[arg(long, default_value = "")]
    cgroupns: String,
    #[arg(long, value_name = "PATH", default_value = "")]
    cgroup_parent: String,
    /// NAME=SOFT[:HARD] (repeatable)
    #[arg(long = "ulimit", value_name = "ULIMIT")]
    ulimits: Vec<String>,
    #[arg(long = "sysctl", value_name = "NAME=VALUE")]
    sysctls: Vec<String>,
    #[arg(long = "storage-opt", value_name = "NAME=VALUE")]
    storage_opts: Vec<String>,
    /// How soon the kernel ends it when memory is short: -1000 to 1000
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, allow_hyphen_values = true)]
    oom_score_adj: i64,
    #[arg(long, value_name = "NAME", default_value = "")]
    runtime: String,
    #[arg(long, default_value = "")]
    log_driver: String,
    #[arg(long = "log-opt", value_name = "NAME=VALUE")]
    log_opts: Vec<String>,
    #[arg(long, default_value = "")]
    stop_signal: String,
    /// Seconds between that signal and the kill
    #[arg(long, value_name = "SECONDS")]
    stop_timeout: Option<i64>,
    /// OS[/ARCHITECTURE] of the image
    #[arg(long, default_value = "")]
    pub(crate) platform: String,
    /// Show no progress of a pull
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// always, missing, or never
    #[arg(long, default_value = "missing")]
    pub(crate) pull: String,
    pub(crate) image: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// What a container is joined by.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Attached {
    Stdin,
    Stdout,
    Stderr,
}

/// What docker's client takes and what means nothing here: signatures that are not looked at, the only isolation
/// that there is, and a limit that kernels no longer have.
#[derive(clap::Args)]
struct IdleArgs {
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    disable_content_trust: Option<bool>,
    #[arg(long, hide = true)]
    isolation: Option<String>,
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
}

impl CreateArgs {
    /// How `run` joins it.
    pub(crate) fn streams(&self, detached: bool) -> anyhow::Result<Streams> {
        anyhow::ensure!(
            !detached || self.attach.is_empty(),
            "conflicting options: cannot specify both --attach and --detach"
        );
        let joins = |stream| self.attach.is_empty() || self.attach.contains(&stream);
        Ok(Streams {
            tty: self.tty,
            interactive: self.interactive && !detached && joins(Attached::Stdin),
            outputs: [joins(Attached::Stdout), joins(Attached::Stderr)],
        })
    }

    /// The network that it is made in, and its places in that and others.
    fn networks(&self) -> anyhow::Result<(String, Map<String, Value>)> {
        let mut places = Map::new();
        for text in &self.networks {
            let (name, place) = network_place(text)?;
            anyhow::ensure!(places.insert(name.clone(), place).is_none(), "network {name} is named twice");
        }
        let first = places.keys().next().cloned().unwrap_or_else(|| "default".to_owned());
        let flags = json!({
            "Aliases": self.aliases, "LinkLocalIPs": self.link_local, "IPv4Address": self.ip, "IPv6Address": self.ip6,
            "MacAddress": self.mac_address,
        });
        let given = |value: &Value| value.as_array().map_or(value != "", |list| !list.is_empty());
        if flags.as_object().is_some_and(|flags| flags.values().any(given)) {
            let place = places.entry(first.clone()).or_insert_with(|| json!({}));
            for (member, value) in flags.as_object().into_iter().flatten().filter(|(_, value)| given(value)) {
                let to = match member.as_str() {
                    "Aliases" | "MacAddress" => &mut place[member],
                    _ => &mut place["IPAMConfig"][member],
                };
                anyhow::ensure!(
                    to.is_null(),
                    "conflicting options: {member} is given by a flag of its own and in --network"
                );
                *to = value.clone();
            }
        }
        Ok((first, places))
    }
}

/// What a container may use; for `run`, `create` and `update` alike.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct LimitArgs {
    /// Memory it may use, such as 512m
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// Memory and swap together; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Memory that it is pushed back to when the host is short of it
    #[arg(long, value_name = "SIZE")]
    memory_reservation: Option<String>,
    #[arg(long, value_name = "PERCENT")]
    memory_swappiness: Option<i64>,
    #[arg(long)]
    oom_kill_disable: bool,
    /// CPUs it may use, such as 1.5
    #[arg(long)]
    cpus: Option<f64>,
    /// Its weight among others
    #[arg(short, long, value_name = "N")]
    cpu_shares: Option<i64>,
    /// Microseconds
    #[arg(long, value_name = "N")]
    cpu_period: Option<i64>,
    /// Microseconds in each period
    #[arg(long, value_name = "N")]
    cpu_quota: Option<i64>,
    /// The CPUs it may run on, such as 0-1
    #[arg(long, value_name = "CPUS")]
    cpuset_cpus: Option<String>,
    #[arg(long, value_name = "NODES")]
    cpuset_mems: Option<String>,
    #[arg(long, value_name = "N")]
    pids_limit: Option<i64>,
    /// Its weight for disks: 10 to 1000
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u16>,
    /// Its weight for one disk: PATH:WEIGHT (repeatable)
    #[arg(long, value_name = "PATH:N")]
    blkio_weight_device: Vec<String>,
    /// What it may read of a device a second: PATH:BYTES, as in /dev/sda:1mb (repeatable)
    #[arg(long, value_name = "PATH:BYTES")]
    device_read_bps: Vec<String>,
    #[arg(long, value_name = "PATH:BYTES")]
    device_write_bps: Vec<String>,
    /// How often it may read from a device a second (repeatable)
    #[arg(long, value_name = "PATH:N")]
    device_read_iops: Vec<String>,
    #[arg(long, value_name = "PATH:N")]
    device_write_iops: Vec<String>,
}

impl LimitArgs {
    /// Writes down what is asked for, and nothing else.
    pub(crate) fn apply(&self, to: &mut Value) -> anyhow::Result<()> {
        let bytes = |text: &Option<String>| match text.as_deref() {
            Some("-1") => Ok(Some(json!(-1))),
            other => other.map(|text| size(text).map(|bytes| json!(bytes))).transpose(),
        };
        for (member, value) in [
            ("Memory", bytes(&self.memory)?),
            ("MemorySwap", bytes(&self.memory_swap)?),
            ("MemoryReservation", bytes(&self.memory_reservation)?),
            ("MemorySwappiness", self.memory_swappiness.map(|n| json!(n))),
            ("OomKillDisable", self.oom_kill_disable.then(|| json!(true))),
            ("NanoCpus", self.cpus.map(|cpus| json!(nano_cpus(cpus)))),
            ("CpuShares", self.cpu_shares.map(|n| json!(n))),
            ("CpuPeriod", self.cpu_period.map(|n| json!(n))),
            ("CpuQuota", self.cpu_quota.map(|n| json!(n))),
            ("CpusetCpus", self.cpuset_cpus.as_ref().map(|t| json!(t))),
            ("CpusetMems", self.cpuset_mems.as_ref().map(|t| json!(t))),
            ("PidsLimit", self.pids_limit.map(|n| json!(n))),
            ("BlkioWeight", self.blkio_weight.map(|n| json!(n))),
        ] {
            if let Some(value) = value {
                to[member] = value;
            }
        }
        for (member, key, given) in [
            ("BlkioWeightDevice", "Weight", &self.blkio_weight_device),
            ("BlkioDeviceReadBps", "Rate", &self.device_read_bps),
            ("BlkioDeviceWriteBps", "Rate", &self.device_write_bps),
            ("BlkioDeviceReadIOps", "Rate", &self.device_read_iops),
            ("BlkioDeviceWriteIOps", "Rate", &self.device_write_iops),
        ] {
            if !given.is_empty() {
                let limits = given.iter().map(|text| device_limit(text, key)).collect::<anyhow::Result<Vec<_>>>()?;
                to[member] = json!(limits);
            }
        }
        Ok(())
    }
}

/// `PATH:AMOUNT`
fn device_limit(text: &str, key: &str) -> anyhow::Result<Value> {
    let (path, amount) = text
        .rsplit_once(':')
        .filter(|(path, _)| path.starts_with('/'))
        .with_context(|| format!("{text:?} cannot be read: write PATH:AMOUNT, as in /dev/sda:1mb"))?;
    Ok(json!({"Path": path, key: size(amount)?}))
}

/// The query and body of the request.
pub(crate) fn create_body(args: &CreateArgs) -> anyhow::Result<(String, Value)> {
    let env = environment(&[file_lines(&args.env_files)?, args.env.clone()].concat());
    let (bindings, mut exposed) = ports(&args.publish)?;
    exposed.extend(args.expose.iter().map(|port| (with_protocol(port), json!({}))));
    let (mut binds, mut nameless) = (Vec::new(), Map::new());
    for volume in &args.volumes {
        if volume.contains(':') {
            binds.push(absolute(volume)?);
        } else {
            nameless.insert(volume.clone(), json!({}));
        }
    }
    let labels = members(&[file_lines(&args.label_files)?, args.labels.clone()].concat());
    let tmpfs: Map<String, Value> = args
        .tmpfs
        .iter()
        .map(|text| text.split_once(':').unwrap_or((text, "")))
        .map(|(target, options)| (target.to_owned(), json!(options)))
        .collect();
    let (network, places) = args.networks()?;
    // Names that vendors gave to devices are no paths.
    let (names, paths): (Vec<_>, Vec<_>) =
        args.devices.iter().partition(|text| !text.starts_with('/') && text.contains('='));
    let mut host_config = json!({
        "Binds": binds, "Tmpfs": tmpfs, "PortBindings": bindings, "PublishAllPorts": args.publish_all,
        "Mounts": all(&args.mounts, mount)?, "VolumesFrom": args.volumes_from,
        "VolumeDriver": args.volume_driver, "NetworkMode": network, "AutoRemove": args.rm,
        "RestartPolicy": restart_policy(&args.restart)?, "Init": args.init, "ReadonlyRootfs": args.read_only,
        "ShmSize": optional_size(args.shm_size.as_deref())?, "Privileged": args.privileged, "CapAdd": args.cap_add,
        "CapDrop": args.cap_drop, "ExtraHosts": args.hosts, "Links": args.links,
        "Dns": args.dns, "DnsOptions": args.dns_option, "DnsSearch": args.dns_search, "GroupAdd": args.group_add,
        "PidMode": args.pid, "IpcMode": args.ipc, "UTSMode": args.uts, "UsernsMode": args.userns,
        "CgroupnsMode": args.cgroupns, "CgroupParent": args.cgroup_parent, "Runtime": args.runtime,
        "Ulimits": all(&args.ulimits, ulimit)?, "Sysctls": members(&args.sysctls),
        "StorageOpt": members(&args.storage_opts), "OomScoreAdj": args.oom_score_adj,
        "Annotations": members(&args.annotations), "DeviceCgroupRules": args.device_rules,
        "LogConfig": {"Type": args.log_driver, "Config": members(&args.log_opts)},
        "Devices": paths.into_iter().map(|text| device(text)).collect::<Vec<_>>(),
    });
    let mut requests = Vec::new();
    if !names.is_empty() {
        requests.push(json!({"Driver": "cdi", "DeviceIDs": names}));
    }
    if let Some(gpus) = &args.gpus {
        requests.push(json!({"Driver": "", "Options": {"gpus": gpus}, "Capabilities": [["gpu"]]}));
    }
    host_config["DeviceRequests"] = json!(requests);
    if let Some(window) = crate::streams::window(args.tty) {
        host_config["ConsoleSize"] = json!(window);
    }
    args.limits.apply(&mut host_config)?;
    add_security_options(&args.security_opt, &mut host_config)?;
    let mut body = json!({
        "Image": args.image, "Env": env, "Labels": labels, "Hostname": args.hostname, "Domainname": args.domainname,
        "User": args.user, "WorkingDir": args.workdir, "Tty": args.tty, "OpenStdin": args.interactive,
        "StdinOnce": args.interactive, "AttachStdin": args.interactive, "StopSignal": args.stop_signal,
        "StopTimeout": args.stop_timeout, "ExposedPorts": exposed, "Volumes": nameless, "HostConfig": host_config,
    });
    args.health.apply(&mut body)?;
    if !args.command.is_empty() {
        body["Cmd"] = json!(args.command);
    }
    if let Some(entrypoint) = &args.entrypoint {
        body["Entrypoint"] = json!([entrypoint]);
    }
    if places.values().any(|place| *place != json!({})) || places.len() > 1 {
        body["NetworkingConfig"] = json!({"EndpointsConfig": places});
    }
    Ok((format!("name={}&platform={}", escape(&args.name), escape(&args.platform)), body))
}

/// Reads each of a flag's values.
fn all<T>(texts: &[String], read: impl Fn(&str) -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    texts.iter().map(|text| read(text)).collect()
}

pub(crate) fn with_protocol(port: &str) -> String {
    if port.contains('/') { port.to_owned() } else { format!("{port}/tcp") }
}

pub(crate) fn restart_policy(text: &str) -> anyhow::Result<Value> {
    let (name, count) = text.split_once(':').unwrap_or((text, "0"));
    let count: u32 = count.parse().with_context(|| format!("restart policy {text:?}: {count:?} is no number"))?;
    Ok(json!({"Name": name, "MaximumRetryCount": count}))
}

/// Billionths of a CPU.
#[expect(clippy::cast_possible_truncation, reason = "a number of CPUs is small")]
fn nano_cpus(cpus: f64) -> i64 {
    (cpus * 1e9) as i64
}

fn add_security_options(options: &[String], host_config: &mut Value) -> anyhow::Result<()> {
    /// The kernel's own files, neither hidden nor read-only: said to the daemon as two empty lists.
    const SHOWN: &str = "systempaths=unconfined";
    let one = |option: &String| match option.split_once('=') {
        // The daemon is given the profile itself: it may not see the file.
        Some(("seccomp", path)) if !matches!(path, "unconfined" | "builtin") => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("seccomp profile {path} cannot be read"))?;
            Ok(format!("seccomp={text}"))
        }
        _ => Ok(option.clone()),
    };
    if options.iter().any(|option| option == SHOWN) {
        host_config["MaskedPaths"] = json!([]);
        host_config["ReadonlyPaths"] = json!([]);
    }
    let said = options.iter().filter(|&option| option != SHOWN).map(one);
    host_config["SecurityOpt"] = json!(said.collect::<anyhow::Result<Vec<String>>>()?);
    Ok(())
}

fn device(text: &str) -> Value {
    let mut parts = text.split(':');
    let host = parts.next().unwrap_or_default();
    json!({"PathOnHost": host, "PathInContainer": parts.next().unwrap_or(host),
        "CgroupPermissions": parts.next().unwrap_or("rwm")})
}

/// A path that is relative to us is made absolute; a volume's name has no slash.
fn absolute(volume: &str) -> anyhow::Result<String> {
    match volume.split_once(':') {
        Some((source, rest)) if source.starts_with('.') => {
            let path = std::fs::canonicalize(source).with_context(|| format!("{source} is not there"))?;
            Ok(format!("{}:{rest}", path.display()))
        }
        _ => Ok(volume.to_owned()),
    }
}

/// Reads `[[IP:]HOST:]CONTAINER[/PROTOCOL]`, with ranges on both sides.
fn ports(texts: &[String]) -> anyhow::Result<(Map<String, Value>, Map<String, Value>)> {
    let (mut bindings, mut exposed) = (Map::new(), Map::new());
    let mut publish = |key: &str, ip: &str, port: &str| {
        exposed.insert(key.to_owned(), json!({}));
        if let Value::Array(list) = bindings.entry(key).or_insert_with(|| json!([])) {
            list.push(json!({"HostIp": ip, "HostPort": port}));
        }
    };
    for text in texts {
        let wrong = || format!("port {text:?} cannot be read: write [[IP:]HOST:]CONTAINER[/PROTOCOL]");
        let (numbers, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let parts: Vec<&str> = numbers.rsplitn(3, ':').collect();
        let (container, host, ip) = match parts.as_slice() {
            [container] => (*container, "", ""),
            [container, host] => (*container, *host, ""),
            [container, host, ip] => (*container, *host, ip.trim_matches(['[', ']'])),
            _ => anyhow::bail!(wrong()),
        };
        let containers = range(container).with_context(wrong)?;
        let hosts = if host.is_empty() { None } else { Some(range(host).with_context(wrong)?) };
        if hosts.as_ref().is_some_and(|hosts| containers.len() == 1 && hosts.len() > 1) {
            // Any of them will do.
            publish(&format!("{container}/{protocol}"), ip, host);
            continue;
        }
        anyhow::ensure!(hosts.as_ref().is_none_or(|hosts| hosts.len() == containers.len()), wrong());
        for (at, port) in containers.enumerate() {
            let key = format!("{port}/{protocol}");
            let number = hosts.as_ref().and_then(|hosts| hosts.clone().nth(at)).map(|port| port.to_string());
            publish(&key, ip, &number.unwrap_or_default());
        }
    }
    Ok((bindings, exposed))
}

fn range(text: &str) -> anyhow::Result<std::ops::Range<u32>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse()?, last.parse()?);
    anyhow::ensure!(first > 0 && first <= last, "{text} is no range of ports");
    Ok(u32::from(first)..u32::from(last) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: &str) {
        let got = ports(&[text.to_owned()])
            .map_or_else(|error| format!("{error:#}"), |(bindings, _)| Value::Object(bindings).to_string());
        assert!(got.contains(want), "{got} should say {want}");
    }

    #[test]
    fn ports_are_read_as_the_docker_client_reads_them() {
        check("80", r#"{"80/tcp":[{"HostIp":"","HostPort":""}]}"#);
        check("8080:80/udp", r#"{"80/udp":[{"HostIp":"","HostPort":"8080"}]}"#);
        check("127.0.0.1:8080:80", r#""HostIp":"127.0.0.1","HostPort":"8080""#);
        check("9000-9001:80-81", r#""81/tcp":[{"HostIp":"","HostPort":"9001"}]"#);
        check("9000-9002:80-81", "cannot be read");
        check("9000-9002:80", r#"{"80/tcp":[{"HostIp":"","HostPort":"9000-9002"}]}"#);
        check("[::1]:8080:80", r#"{"HostIp":"::1","HostPort":"8080"}"#);
        check("web:80", "cannot be read");
    }

    #[test]
    fn sizes_and_policies_are_read_or_refused() {
        let limits = LimitArgs { memory: Some("64m".into()), memory_swap: Some("-1".into()), ..LimitArgs::default() };
        let mut written = json!({});
        limits.apply(&mut written).unwrap();
        assert_eq!(written, json!({"Memory": 64 << 20, "MemorySwap": -1}), "what is not asked for is not said");
        assert!(LimitArgs { memory: Some("much".into()), ..limits }.apply(&mut written).is_err());
        assert_eq!(restart_policy("on-failure:3").unwrap()["MaximumRetryCount"], 3);
        assert!(restart_policy("on-failure:x").is_err());
    }
}
