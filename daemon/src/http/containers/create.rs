//! Making a container from a request.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use axum::extract::Query;
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use skep_api::container::{HealthConfig, Mount, Ulimit};
use skep_engine::{
    BlockLimit, BlockLimitKind, ContainerConfig, HOST_GATEWAY, LogConfig, MountSource, NetworkMode, Platform,
    RemoveOptions, ResourceLimits, RestartPolicy, block_device,
};
use skep_worker::health_check;

use super::devices::{self, DeviceBody, DeviceRequest};
use super::modes::{Modes, cgroup_mode};
use super::mounts::{
    add_inherited, clean_target, keep_data_root_below, keep_writable_below, mounts, require_known_kinds, volumes_from,
};
use super::ports::{PortBinding, exposed, published};
use super::security;
use crate::config::ContainerSettings;
use crate::http::images::platform;
use crate::http::json::{JsonBody, read};
use crate::http::networks::joining::EndpointBody;
use crate::http::system::has_cgroups_v2;
use crate::http::{ApiError, AskedVersion, MINOR_MAX, State};

/// The Engine API's `ContainerConfig` with the host's part beside it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct CreateBody {
    image: String,
    pub(super) hostname: String,
    domainname: String,
    user: String,
    pub(super) env: Vec<String>,
    #[serde(deserialize_with = "words")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "words")]
    entrypoint: Vec<String>,
    pub(super) working_dir: String,
    labels: BTreeMap<String, String>,
    pub(super) mac_address: String,
    stop_signal: String,
    stop_timeout: Option<i64>,
    pub(super) healthcheck: Option<HealthConfig>,
    tty: bool,
    open_stdin: bool,
    stdin_once: bool,
    volumes: BTreeMap<String, Value>,
    pub(super) exposed_ports: BTreeMap<String, Value>,
    pub(super) host_config: HostConfig,
    pub(super) networking_config: NetworkingConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct NetworkingConfig {
    pub(super) endpoints_config: BTreeMap<String, EndpointBody>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct HostConfig {
    binds: Vec<String>,
    mounts: Vec<Mount>,
    tmpfs: BTreeMap<String, String>,
    volumes_from: Vec<String>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) port_bindings: BTreeMap<String, Vec<PortBinding>>,
    pub(super) publish_all_ports: bool,
    pub(super) network_mode: String,
    auto_remove: bool,
    restart_policy: RestartPolicyBody,
    privileged: bool,
    pub(super) cap_add: Vec<String>,
    pub(super) cap_drop: Vec<String>,
    pub(super) dns: Vec<String>,
    dns_search: Vec<String>,
    dns_options: Vec<String>,
    pub(super) extra_hosts: Vec<String>,
    /// `NAME[:ALIAS]`.
    pub(super) links: Vec<String>,
    group_add: Vec<String>,
    readonly_rootfs: bool,
    init: Option<bool>,
    sysctls: BTreeMap<String, String>,
    pub(super) oom_score_adj: i64,
    security_opt: Vec<String>,
    masked_paths: Option<Vec<String>>,
    readonly_paths: Option<Vec<String>>,
    devices: Vec<DeviceBody>,
    device_requests: Vec<DeviceRequest>,
    device_cgroup_rules: Vec<String>,
    pub(super) shm_size: i64,
    pub(super) pid_mode: String,
    pub(super) ipc_mode: String,
    #[serde(rename = "UTSMode")]
    pub(super) uts_mode: String,
    userns_mode: String,
    cgroupns_mode: String,
    cgroup_parent: String,
    log_config: LogConfigBody,
    #[serde(flatten)]
    pub(super) resources: Resources,
}

/// What may also be changed while it runs.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Resources {
    pub(super) memory: i64,
    pub(super) memory_reservation: i64,
    pub(super) memory_swap: i64,
    pub(super) memory_swappiness: Option<i64>,
    oom_kill_disable: bool,
    pub(super) nano_cpus: i64,
    pub(super) cpu_shares: i64,
    pub(super) cpu_period: i64,
    pub(super) cpu_quota: i64,
    pub(super) cpuset_cpus: String,
    pub(super) cpuset_mems: String,
    pids_limit: i64,
    pub(super) blkio_weight: u16,
    blkio_weight_device: Vec<BlockBody>,
    blkio_device_read_bps: Vec<BlockBody>,
    blkio_device_write_bps: Vec<BlockBody>,
    #[serde(rename = "BlkioDeviceReadIOps")]
    blkio_device_read_iops: Vec<BlockBody>,
    #[serde(rename = "BlkioDeviceWriteIOps")]
    blkio_device_write_iops: Vec<BlockBody>,
    ulimits: Vec<Ulimit>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct RestartPolicyBody {
    name: String,
    maximum_retry_count: i64,
}

/// How much is to be had of a block device of the host's.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct BlockBody {
    path: String,
    rate: u64,
    weight: u16,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct LogConfigBody {
    #[serde(rename = "Type")]
    driver: String,
    config: BTreeMap<String, String>,
}

/// A command line as words, or in one string.
fn words<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Words(Vec<String>),
        One(String),
    }
    Ok(match Either::deserialize(d)? {
        Either::Words(words) => words,
        Either::One(text) => vec![text],
    })
}

/// Members that are known and not supported yet, with the values that ask for nothing.
const UNSUPPORTED: [(&str, &[&str], &str); 5] = [
    ("/HostConfig/UsernsMode", &["host"], "--userns other than host"),
    ("/HostConfig/StorageOpt", &[], "--storage-opt"),
    ("/HostConfig/CpuRealtimePeriod", &[], "--cpu-rt-period"),
    ("/HostConfig/CpuRealtimeRuntime", &[], "--cpu-rt-runtime"),
    ("/HostConfig/Isolation", &["default"], "--isolation"),
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
    #[serde(default)]
    platform: String,
}

/// Clients of an older version do not expect a container in several networks from the start.
const SEVERAL_NETWORKS_SINCE: u32 = 44;
/// Those before these versions expect memory that others may join, and the host's view of cgroups where there are those of
/// version 1.
const PRIVATE_IPC_SINCE: u32 = 40;
const PRIVATE_CGROUPS_SINCE: u32 = 41;

/// Fills in what a client of API version 1.`minor` takes for granted, and writes paths in one form.
fn complete(request: &mut Value, minor: u32, settings: &ContainerSettings) {
    if let Some(dir) = request["WorkingDir"].as_str().filter(|dir| dir.starts_with('/')) {
        request["WorkingDir"] = json!(clean_target(dir));
    }
    if request.get("HostConfig").is_none() {
        request["HostConfig"] = json!({});
    }
    let Some(host) = request["HostConfig"].as_object_mut() else { return };
    let mut usual = |key: &str, value: &str| {
        if host.get(key).is_none_or(|said| said.is_null() || said == "") {
            host.insert(key.into(), json!(value));
        }
    };
    if minor < PRIVATE_IPC_SINCE || settings.shares_memory {
        usual("IpcMode", "shareable");
    }
    if minor < PRIVATE_CGROUPS_SINCE && !has_cgroups_v2() {
        usual("CgroupnsMode", "host");
    }
}

pub(in crate::http) async fn create(
    state: State,
    Query(query): Query<CreateQuery>,
    version: Option<Extension<AskedVersion>>,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut request = read(&body)?;
    let minor = version.map_or(MINOR_MAX, |Extension(AskedVersion(minor))| minor);
    complete(&mut request, minor, &state.config.containers);
    let endpoints = request.pointer("/NetworkingConfig/EndpointsConfig").and_then(Value::as_object);
    if let Some(several) = endpoints.filter(|endpoints| endpoints.len() > 1)
        && minor < SEVERAL_NETWORKS_SINCE
    {
        let names = several.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(ApiError::bad_request(format!(
            "Container cannot be created with multiple network endpoints: {names}; connect it to the others afterwards"
        )));
    }
    let config = container_config(&state, &query.name, request).await?;
    let platform = platform(&query.platform)?;
    let actual = state.engine.image_for(&config.image, platform.as_ref())?.platform();
    let own = Platform::own();
    let mut warnings = Vec::new();
    if platform.is_none() && !own.takes(&actual) {
        warnings.push(format!(
            "The requested image's platform ({actual}) does not match the detected host platform ({own}) and no \
             specific platform was requested"
        ));
    }
    let id = state.engine.create(config)?;
    if let Err(error) = state.engine.fill_volumes(&id).await {
        let options = RemoveOptions { force: true, volumes: true };
        state.engine.remove(&id, options).await?;
        return Err(error.into());
    }
    Ok((StatusCode::CREATED, Json(json!({"Id": id, "Warnings": warnings}))))
}

/// What a request comes to.
async fn container_config(state: &State, name: &str, request: Value) -> Result<ContainerConfig, ApiError> {
    let engine = &state.engine;
    refuse_unsupported(&request)?;
    require_known_kinds(&request)?;
    let body: CreateBody = crate::http::json::from_value(request.clone())?;
    require_command(&request, &body)?;
    let name = name.trim_start_matches('/');
    if !name.is_empty() {
        super::require_name(name)?;
    }
    let image = engine.image(&body.image)?;
    let from = volumes_from(engine, &body.host_config.volumes_from).map_err(ApiError::blame_request)?;
    let modes = Modes::read(state, &body).await.map_err(ApiError::blame_request)?;
    let log = &body.host_config.log_config;
    let log = state.engine.log_config(&log.driver, &log.config).map_err(ApiError::bad_request)?;
    let links = body.host_config.links.clone();
    let host_ip = engine.host_binding(&modes.network);
    let usual = Usual { containers: &state.config.containers, log, host_ip };
    let mut config = body.config(name, image.config.healthcheck.as_ref(), usual)?;
    add_inherited(&mut config.mounts, from);
    keep_data_root_below(&mut config.mounts, engine.data_dir())?;
    keep_writable_below(&mut config.mounts, &request);
    let driver = request.pointer("/HostConfig/VolumeDriver").and_then(Value::as_str).unwrap_or_default();
    let has_volume = config.mounts.iter().any(|mount| matches!(mount.source, MountSource::Volume { .. }));
    if has_volume && !matches!(driver, "" | "local") {
        return Err(ApiError::unsupported(format!("volume driver {driver:?} is not supported yet: use local")));
    }
    let publish_all = request.pointer("/HostConfig/PublishAllPorts") == Some(&Value::Bool(true));
    if publish_all {
        let all = config.exposed_ports.iter().chain(image.config.exposed_ports.keys());
        config.ports.extend(exposed(all, &config.ports, host_ip)?);
    }
    Modes {
        network: config.network,
        pid: config.pid_mode,
        ipc: config.ipc_mode,
        shared_memory: config.shared_memory,
        uts: config.uts_mode,
    } = modes;
    let runtime = request.pointer("/HostConfig/Runtime").and_then(Value::as_str).unwrap_or_default();
    config.runtime = state.config.runtime(runtime).map_err(ApiError::bad_request)?;
    if config.network == NetworkMode::Bridge {
        let links = links.iter().map(|text| engine.link(text));
        config.links = links.collect::<Result<_, _>>().map_err(ApiError::from)?;
    }
    config.request = request;
    Ok(config)
}

/// That there is something to make a container of.
fn require_command(request: &Value, body: &CreateBody) -> Result<(), ApiError> {
    let beside = ["HostConfig", "NetworkingConfig"];
    let says_nothing = |members: &serde_json::Map<_, _>| members.keys().all(|name| beside.contains(&name.as_str()));
    let why = if request.as_object().is_none_or(says_nothing) {
        "config cannot be empty in order to create a container"
    } else if !body.image.is_empty() {
        return Ok(());
    } else if body.entrypoint.is_empty() && body.cmd.is_empty() {
        "no command specified: name an image in Image, or also give Cmd"
    } else {
        "no image is given: name one in Image"
    };
    Err(ApiError::bad_request(why))
}

/// What a container has that does not say.
struct Usual<'a> {
    containers: &'a ContainerSettings,
    log: LogConfig,
    host_ip: Option<IpAddr>,
}

impl CreateBody {
    fn config(
        self,
        name: &str,
        image_check: Option<&HealthConfig>,
        usual: Usual<'_>,
    ) -> Result<ContainerConfig, ApiError> {
        let Usual { containers: usual, log, host_ip } = usual;
        self.check()?;
        let host = self.host_config;
        let restart = restart_policy(&host.restart_policy)?;
        if host.auto_remove && restart != RestartPolicy::No {
            return Err(ApiError::bad_request(
                "can't create 'AutoRemove' container with restart policy: give one of them",
            ));
        }
        let security = security::read(&host.security_opt)?;
        let limits = host.resources.limits()?;
        Ok(ContainerConfig {
            name: name.to_owned(),
            image: self.image,
            entrypoint: self.entrypoint,
            args: self.cmd,
            env: self.env,
            working_dir: self.working_dir,
            user: self.user,
            groups: host.group_add,
            hostname: self.hostname,
            domainname: self.domainname,
            labels: self.labels,
            mounts: mounts(&host.binds, &host.mounts, &host.tmpfs, &self.volumes)?,
            init: host.init,
            read_only: host.readonly_rootfs,
            no_new_privileges: security.no_new_privileges,
            host_users: host.userns_mode == "host",
            seccomp: security.seccomp,
            seccomp_profile: security.profile,
            apparmor: security.apparmor,
            privileged: host.privileged,
            cap_add: host.cap_add,
            cap_drop: host.cap_drop,
            annotations: host.annotations,
            masked_paths: host.masked_paths,
            read_only_paths: host.readonly_paths,
            devices: host.devices.into_iter().map(DeviceBody::read).collect::<Result<_, _>>()?,
            cdi_devices: devices::named(host.device_requests)?,
            device_rules: devices::rules(host.device_cgroup_rules)?,
            shm_size_bytes: host.shm_size,
            cgroup_mode: cgroup_mode(&host.cgroupns_mode, host.privileged, usual.sees_cgroups)?,
            cgroup_parent: host.cgroup_parent,
            sysctls: host.sysctls,
            ulimits: host.resources.ulimits,
            oom_score_adj: host.oom_score_adj,
            limits,
            stop_signal: self.stop_signal,
            stop_timeout: self.stop_timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs),
            health: health_check(self.healthcheck.as_ref(), image_check),
            hosts: host.extra_hosts.iter().map(|text| extra_host(text)).collect::<Result<_, _>>()?,
            dns: host.dns,
            dns_search: host.dns_search,
            dns_options: host.dns_options,
            ports: published(&host.port_bindings, host_ip)?,
            exposed_ports: self.exposed_ports.into_keys().collect(),
            auto_remove: host.auto_remove,
            restart,
            log,
            tty: self.tty,
            open_stdin: self.open_stdin,
            stdin_once: self.stdin_once,
            ..ContainerConfig::default()
        })
    }
}

impl Resources {
    pub(super) fn limits(&self) -> Result<ResourceLimits, ApiError> {
        self.check()?;
        Ok(ResourceLimits {
            nano_cpus: self.nano_cpus,
            cpu_shares: self.cpu_shares.unsigned_abs(),
            memory_bytes: self.memory,
            memory_reservation_bytes: self.memory_reservation,
            // As dockerd does: as much swap as memory, if nothing is said.
            memory_swap_bytes: self.memory_swap,
            memory_swappiness: self.memory_swappiness.and_then(|value| u64::try_from(value).ok()),
            oom_kill_disable: self.oom_kill_disable,
            pids: self.pids_limit.max(0),
            cpu_period_micros: self.cpu_period.unsigned_abs(),
            cpu_quota_micros: self.cpu_quota,
            cpuset_cpus: self.cpuset_cpus.clone(),
            cpuset_mems: self.cpuset_mems.clone(),
            blkio_weight: self.blkio_weight,
            block: self.block_limits()?,
        })
    }

    fn block_limits(&self) -> Result<Vec<BlockLimit>, ApiError> {
        let kinds = [
            (BlockLimitKind::Weight, &self.blkio_weight_device),
            (BlockLimitKind::ReadBytes, &self.blkio_device_read_bps),
            (BlockLimitKind::WriteBytes, &self.blkio_device_write_bps),
            (BlockLimitKind::ReadOperations, &self.blkio_device_read_iops),
            (BlockLimitKind::WriteOperations, &self.blkio_device_write_iops),
        ];
        let limit = |(kind, body): (BlockLimitKind, &BlockBody)| {
            let (major, minor) = block_device(&body.path)
                .map_err(|error| ApiError::bad_request(format!("device {:?} cannot be limited: {error}", body.path)))?;
            let amount = if kind == BlockLimitKind::Weight { u64::from(body.weight) } else { body.rate };
            if kind == BlockLimitKind::Weight && !(10..=1000).contains(&amount) {
                return Err(ApiError::bad_request(format!("range of blkio weight is from 10 to 1000, not {amount}")));
            }
            Ok(BlockLimit { kind, major, minor, amount })
        };
        kinds.into_iter().flat_map(|(kind, list)| list.iter().map(move |body| (kind, body))).map(limit).collect()
    }
}

impl Resources {
    /// Limits as a request would name them.
    pub(super) fn json_of(limits: &ResourceLimits) -> Value {
        json!({
            "Memory": limits.memory_bytes, "MemoryReservation": limits.memory_reservation_bytes,
            "MemorySwap": limits.memory_swap_bytes, "NanoCpus": limits.nano_cpus,
            "CpuShares": limits.cpu_shares, "CpuPeriod": limits.cpu_period_micros,
            "CpuQuota": limits.cpu_quota_micros, "CpusetCpus": limits.cpuset_cpus, "CpusetMems": limits.cpuset_mems,
            "PidsLimit": limits.pids, "BlkioWeight": limits.blkio_weight,
        })
    }
}

impl RestartPolicyBody {
    pub(super) fn is_empty(&self) -> bool {
        self.name.is_empty()
    }
}

pub(super) fn restart_policy(body: &RestartPolicyBody) -> Result<RestartPolicy, ApiError> {
    let retries_max = u32::try_from(body.maximum_retry_count)
        .map_err(|_| ApiError::bad_request("invalid restart policy: maximum retry count cannot be negative"))?;
    let policy = match body.name.as_str() {
        "" | "no" => RestartPolicy::No,
        "always" => RestartPolicy::Always,
        "unless-stopped" => RestartPolicy::UnlessStopped,
        "on-failure" => return Ok(RestartPolicy::OnFailure { retries_max }),
        other => {
            return Err(ApiError::bad_request(format!(
                "invalid restart policy: unknown policy '{other}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
            )));
        }
    };
    if retries_max > 0 {
        return Err(ApiError::bad_request(
            "invalid restart policy: maximum retry count can only be used with 'on-failure'",
        ));
    }
    Ok(policy)
}

/// `NAME:IP` becomes a line of /etc/hosts.
fn extra_host(text: &str) -> Result<String, ApiError> {
    let (name, ip) = text
        .split_once([':', '='])
        .ok_or_else(|| ApiError::bad_request(format!("extra host {text:?} cannot be read: write NAME:IP")))?;
    let ip = ip.trim_matches(['[', ']']);
    if ip != HOST_GATEWAY && ip.parse::<IpAddr>().is_err() {
        return Err(ApiError::bad_request(format!("extra host {text:?}: {ip:?} is no IP address")));
    }
    Ok(format!("{ip}\t{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &str, want: &str) {
        let value: Value = serde_json::from_str(body).unwrap();
        let containers = ContainerSettings::default();
        let usual = Usual { containers: &containers, log: LogConfig::default(), host_ip: None };
        let made = refuse_unsupported(&value).and_then(|()| {
            serde_json::from_value::<CreateBody>(value).unwrap().config("c", None, usual).map(|config| {
                let mounts: Vec<_> = config.mounts.iter().map(|mount| &mount.target).collect();
                format!("{:?} {mounts:?} {:?} {:?} {:?}", config.restart, config.ports, config.hosts, config.args)
            })
        });
        let got = made.unwrap_or_else(|error| format!("{error:?}"));
        assert!(got.contains(want), "{got:?} should say {want:?}");
    }

    #[test]
    fn requests_become_containers_or_are_refused_by_name() {
        check(r#"{"Image":"a","HostConfig":{"NetworkMode":"default","RestartPolicy":{"Name":"no"}}}"#, "No");
        check(r#"{"HostConfig":{"Binds":["data:/d","/tmp:/t:ro"],"Tmpfs":{"/x":"size=1m"}}}"#, r#"["/d", "/t", "/x"]"#);
        check(r#"{"Volumes":{"/v":{}},"Cmd":"true"}"#, r#"["/v"]"#);
        check(r#"{"Cmd":"true"}"#, r#"["true"]"#);
        check(r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"8080"}]}}}"#, "host_port: 8080");
        check(r#"{"HostConfig":{"ExtraHosts":["db:10.0.0.9"]}}"#, "10.0.0.9\\tdb");
        check(r#"{"HostConfig":{"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3}}}"#, "retries_max: 3");
        check(r#"{"HostConfig":{"RestartPolicy":{"Name":"always","MaximumRetryCount":3}}}"#, "only be used");
        check(r#"{"HostConfig":{"RestartPolicy":{"Name":"sometimes"}}}"#, "sometimes");
        check(r#"{"HostConfig":{"AutoRemove":true,"RestartPolicy":{"Name":"always"}}}"#, "AutoRemove");
        check(r#"{"HostConfig":{"Binds":["data:rel"]}}"#, "absolute");
        check(r#"{"HostConfig":{"Binds":["a1:/d","b1:/d"]}}"#, "Duplicate");
        check(r#"{"HostConfig":{"SecurityOpt":["colour=red"]}}"#, "colour=red");
    }
}
