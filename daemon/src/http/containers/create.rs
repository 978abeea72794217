//! Making a container from a request, and starting it.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::container::{HealthConfig, Mount, Ulimit};
use skep_api::service::Protocol;
use skep_engine::{
    ContainerConfig, ContainerMount, ContainerState, LogConfig, MountSource, NetworkMode, PublishedPort, ResourceLimits,
};
use skep_worker::{container_mount, health_check};

use crate::http::{ApiError, State, json::parse};

/// The Engine API's `ContainerConfig` with the host's part beside it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct CreateBody {
    image: String,
    hostname: String,
    user: String,
    env: Vec<String>,
    cmd: Vec<String>,
    entrypoint: Vec<String>,
    working_dir: String,
    labels: BTreeMap<String, String>,
    stop_signal: String,
    healthcheck: Option<HealthConfig>,
    host_config: HostConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HostConfig {
    binds: Vec<String>,
    mounts: Vec<Mount>,
    tmpfs: BTreeMap<String, String>,
    port_bindings: BTreeMap<String, Vec<PortBinding>>,
    network_mode: String,
    auto_remove: bool,
    cap_add: Vec<String>,
    cap_drop: Vec<String>,
    dns: Vec<String>,
    dns_search: Vec<String>,
    dns_options: Vec<String>,
    extra_hosts: Vec<String>,
    group_add: Vec<String>,
    readonly_rootfs: bool,
    init: bool,
    sysctls: BTreeMap<String, String>,
    ulimits: Vec<Ulimit>,
    oom_score_adj: i64,
    security_opt: Vec<String>,
    memory: i64,
    memory_reservation: i64,
    nano_cpus: i64,
    cpu_shares: u64,
    pids_limit: i64,
    log_config: LogConfigBody,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct PortBinding {
    host_ip: String,
    host_port: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct LogConfigBody {
    #[serde(rename = "Type")]
    driver: String,
    config: BTreeMap<String, String>,
}

/// Members that are known and not supported yet, with the values that ask for nothing.
const UNSUPPORTED: [(&str, &[&str], &str); 33] = [
    ("/Tty", &[], "a terminal (--tty)"),
    ("/OpenStdin", &[], "standard input (--interactive)"),
    ("/HostConfig/Privileged", &[], "--privileged"),
    ("/HostConfig/PublishAllPorts", &[], "--publish-all"),
    ("/HostConfig/Devices", &[], "--device"),
    ("/HostConfig/DeviceRequests", &[], "--gpus"),
    ("/HostConfig/VolumesFrom", &[], "--volumes-from"),
    ("/HostConfig/Links", &[], "--link: join a network and use names instead, which"),
    ("/HostConfig/RestartPolicy/Name", &["no"], "--restart"),
    ("/HostConfig/PidMode", &[], "--pid"),
    ("/HostConfig/IpcMode", &["private", "shareable"], "--ipc"),
    ("/HostConfig/UTSMode", &[], "--uts"),
    ("/HostConfig/UsernsMode", &[], "--userns"),
    ("/HostConfig/CgroupnsMode", &["private"], "--cgroupns"),
    ("/HostConfig/CpusetCpus", &[], "--cpuset-cpus"),
    ("/HostConfig/Runtime", &["skep"], "--runtime"),
    ("/HostConfig/ShmSize", &[], "--shm-size"),
    ("/Domainname", &[], "--domainname"),
    ("/MacAddress", &[], "--mac-address"),
    ("/StopTimeout", &[], "--stop-timeout: give the time to stop, which"),
    ("/Volumes", &[], "an anonymous volume: name it (--volume NAME:TARGET), since a nameless one"),
    ("/HostConfig/VolumeDriver", &["local"], "--volume-driver"),
    ("/HostConfig/CgroupParent", &[], "--cgroup-parent"),
    ("/HostConfig/DeviceCgroupRules", &[], "--device-cgroup-rule"),
    ("/HostConfig/StorageOpt", &[], "--storage-opt"),
    ("/HostConfig/OomKillDisable", &[], "--oom-kill-disable"),
    ("/HostConfig/MemorySwap", &[], "--memory-swap"),
    ("/HostConfig/CpuPeriod", &[], "--cpu-period: use --cpus, since it"),
    ("/HostConfig/CpuQuota", &[], "--cpu-quota: use --cpus, since it"),
    ("/HostConfig/CpuRealtimePeriod", &[], "--cpu-rt-period"),
    ("/HostConfig/CpuRealtimeRuntime", &[], "--cpu-rt-runtime"),
    ("/HostConfig/CpusetMems", &[], "--cpuset-mems"),
    ("/HostConfig/BlkioWeight", &[], "--blkio-weight"),
];

fn refuse_unsupported(body: &Value) -> Result<(), ApiError> {
    for (pointer, harmless, what) in UNSUPPORTED {
        let asks = match body.pointer(pointer) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::String(text)) => !text.is_empty() && !harmless.contains(&text.as_str()),
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Number(number)) => number.as_i64() != Some(0),
            Some(Value::Object(members)) => !members.is_empty(),
            Some(Value::Bool(true)) => true,
        };
        if asks {
            return Err(ApiError::unsupported(format!("{what} is not supported yet")));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
pub(in crate::http) struct CreateQuery {
    #[serde(default)]
    name: String,
}

pub(in crate::http) async fn create(
    state: State,
    Query(query): Query<CreateQuery>,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    refuse_unsupported(&parse::<Value>(&body)?)?;
    let body: CreateBody = parse(&body)?;
    let image = state.engine.image(&body.image)?;
    let config = body.config(&query.name, image.config.healthcheck.as_ref())?;
    let id = state.engine.create(config)?;
    Ok((StatusCode::CREATED, Json(json!({"Id": id, "Warnings": []}))))
}

impl CreateBody {
    fn config(self, name: &str, image_check: Option<&HealthConfig>) -> Result<ContainerConfig, ApiError> {
        let host = self.host_config;
        let log = LogConfig::parse(&host.log_config.driver, &host.log_config.config).map_err(ApiError::bad_request)?;
        let (no_new_privileges, seccomp) = security(&host.security_opt)?;
        Ok(ContainerConfig {
            name: name.to_owned(),
            image: self.image,
            image_id: String::new(),
            entrypoint: self.entrypoint,
            args: self.cmd,
            env: self.env,
            working_dir: self.working_dir,
            user: self.user,
            groups: host.group_add,
            hostname: self.hostname,
            labels: self.labels,
            mounts: mounts(&host.binds, &host.mounts, &host.tmpfs)?,
            payloads: Vec::new(),
            init: host.init,
            read_only: host.readonly_rootfs,
            no_new_privileges,
            seccomp,
            cap_add: host.cap_add,
            cap_drop: host.cap_drop,
            sysctls: host.sysctls,
            ulimits: host.ulimits,
            oom_score_adj: host.oom_score_adj,
            limits: ResourceLimits {
                nano_cpus: host.nano_cpus,
                cpu_shares: host.cpu_shares,
                memory_bytes: host.memory,
                memory_reservation_bytes: host.memory_reservation,
                pids: host.pids_limit.max(0),
            },
            stop_signal: self.stop_signal,
            health: health_check(self.healthcheck.as_ref(), image_check),
            hosts: host.extra_hosts.iter().map(|text| extra_host(text)).collect::<Result<_, _>>()?,
            dns: host.dns,
            dns_search: host.dns_search,
            dns_options: host.dns_options,
            network: network(&host.network_mode)?,
            ports: ports(&host.port_bindings)?,
            auto_remove: host.auto_remove,
            log,
        })
    }
}

fn network(mode: &str) -> Result<NetworkMode, ApiError> {
    match mode {
        "" | "default" | "bridge" => Ok(NetworkMode::Bridge),
        "host" => Ok(NetworkMode::Host),
        "none" => Ok(NetworkMode::None),
        other => Err(ApiError::unsupported(format!(
            "network {other:?} for a single container is not supported yet: use bridge, host or none, or a service"
        ))),
    }
}

/// Whether privileges may be gained, and whether system calls are filtered.
fn security(options: &[String]) -> Result<(Option<bool>, bool), ApiError> {
    let (mut no_new_privileges, mut seccomp) = (None, true);
    for option in options {
        match option.replace('=', ":").as_str() {
            "no-new-privileges" | "no-new-privileges:true" => no_new_privileges = Some(true),
            "no-new-privileges:false" => no_new_privileges = Some(false),
            "seccomp:unconfined" => seccomp = false,
            "seccomp:builtin" => {}
            _ => return Err(ApiError::unsupported(format!("security option {option:?} is not supported yet"))),
        }
    }
    Ok((no_new_privileges, seccomp))
}

/// `NAME:IP` becomes a line of /etc/hosts.
fn extra_host(text: &str) -> Result<String, ApiError> {
    let (name, ip) = text
        .split_once([':', '='])
        .ok_or_else(|| ApiError::bad_request(format!("extra host {text:?} cannot be read: write NAME:IP")))?;
    let ip = ip.trim_matches(['[', ']']);
    if ip.parse::<std::net::IpAddr>().is_err() {
        return Err(ApiError::bad_request(format!("extra host {text:?}: {ip:?} is no IP address")));
    }
    Ok(format!("{ip} {name}"))
}

fn mounts(
    binds: &[String],
    mounts: &[Mount],
    tmpfs: &BTreeMap<String, String>,
) -> Result<Vec<ContainerMount>, ApiError> {
    let mut all: Vec<ContainerMount> = mounts.iter().map(container_mount).collect();
    for text in binds {
        all.push(bind(text)?);
    }
    for (target, options) in tmpfs {
        let option = |name: &str| options.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let size_bytes = option("size").and_then(skep_engine::parse_size).and_then(|size| i64::try_from(size).ok());
        let mode = option("mode").and_then(|mode| u32::from_str_radix(mode, 8).ok());
        let read_only = options.split(',').any(|part| part == "ro");
        let source = MountSource::Tmpfs { size_bytes, mode };
        all.push(ContainerMount { source, target: target.clone(), read_only });
    }
    for mount in &all {
        if !mount.target.starts_with('/') || mount.target.split('/').any(|part| part == "..") {
            let target = &mount.target;
            return Err(ApiError::bad_request(format!("mount target {target:?} must be an absolute path without ..")));
        }
    }
    Ok(all)
}

/// Reads `SOURCE:TARGET[:OPTIONS]`: a path of the host, or a volume's name.
fn bind(text: &str) -> Result<ContainerMount, ApiError> {
    let wrong = || ApiError::bad_request(format!("bind {text:?} cannot be read: write SOURCE:TARGET[:ro]"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [target] => ("", *target, ""),
        [source, target] => (*source, *target, ""),
        [source, target, options] => (*source, *target, *options),
        _ => return Err(wrong()),
    };
    let source = if source.starts_with('/') {
        // As dockerd does for this form: what is not there is made.
        std::fs::create_dir_all(source)
            .or_else(|error| if std::path::Path::new(source).exists() { Ok(()) } else { Err(error) })
            .map_err(|error| ApiError::bad_request(format!("bind source {source}: {error}")))?;
        MountSource::Bind { path: source.to_owned(), propagation: String::new() }
    } else {
        MountSource::Volume { name: source.to_owned(), labels: BTreeMap::new(), no_copy: false }
    };
    let read_only = options.split(',').any(|option| option == "ro");
    Ok(ContainerMount { source, target: target.to_owned(), read_only })
}

fn ports(bindings: &BTreeMap<String, Vec<PortBinding>>) -> Result<Vec<PublishedPort>, ApiError> {
    let mut ports = Vec::new();
    for (key, bindings) in bindings {
        let wrong = || ApiError::bad_request(format!("port {key:?} cannot be read: write 80/tcp"));
        let (number, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
        let container_port = number.parse().map_err(|_| wrong())?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(wrong()),
        };
        for PortBinding { host_ip, host_port } in bindings {
            if !matches!(host_ip.as_str(), "" | "0.0.0.0" | "::") {
                return Err(ApiError::unsupported(format!(
                    "publishing on the address {host_ip} alone is not supported yet for single containers"
                )));
            }
            let host_port = if host_port.is_empty() {
                0
            } else {
                host_port.parse().map_err(|_| ApiError::bad_request(format!("host port {host_port:?} is no port")))?
            };
            ports.push(PublishedPort { protocol, container_port, host_port });
        }
    }
    Ok(ports)
}

pub(in crate::http) async fn start(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    if matches!(state.engine.inspect(&id)?.state, ContainerState::Running(_)) {
        return Ok(StatusCode::NOT_MODIFIED);
    }
    state.engine.start(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(in crate::http) struct RestartQuery {
    t: Option<u64>,
}

pub(in crate::http) async fn restart(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<RestartQuery>,
) -> Result<StatusCode, ApiError> {
    if matches!(state.engine.inspect(&id)?.state, ContainerState::Running(_)) {
        state.engine.stop(&id, Duration::from_secs(query.t.unwrap_or(10))).await?;
    }
    state.engine.start(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &str, want: &str) {
        let value: Value = serde_json::from_str(body).unwrap();
        let made = refuse_unsupported(&value).and_then(|()| {
            serde_json::from_value::<CreateBody>(value).unwrap().config("c", None).map(|config| {
                let mounts: Vec<_> = config.mounts.iter().map(|mount| &mount.target).collect();
                format!("{:?} {mounts:?} {:?} {:?}", config.network, config.ports, config.hosts)
            })
        });
        let got = made.unwrap_or_else(|error| format!("{error:?}"));
        assert!(got.contains(want), "{got:?} should say {want:?}");
    }

    #[test]
    fn requests_become_containers_or_are_refused_by_name() {
        check(r#"{"Image":"a","HostConfig":{"NetworkMode":"default","RestartPolicy":{"Name":"no"}}}"#, "Bridge");
        check(r#"{"HostConfig":{"Binds":["data:/d","/tmp:/t:ro"],"Tmpfs":{"/x":"size=1m"}}}"#, r#"["/d", "/t", "/x"]"#);
        check(r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"8080"}]}}}"#, "host_port: 8080");
        check(r#"{"HostConfig":{"ExtraHosts":["db:10.0.0.9"]}}"#, "10.0.0.9 db");
        check(r#"{"Tty":true}"#, "--tty");
        check(r#"{"HostConfig":{"Privileged":true}}"#, "--privileged");
        check(r#"{"HostConfig":{"RestartPolicy":{"Name":"always"}}}"#, "--restart");
        check(r#"{"HostConfig":{"NetworkMode":"mine"}}"#, "mine");
        check(r#"{"HostConfig":{"Binds":["data:rel"]}}"#, "absolute");
        check(r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1"}]}}}"#, "127.0.0.1 alone");
        check(r#"{"HostConfig":{"SecurityOpt":["label=disable"]}}"#, "label=disable");
    }
}
