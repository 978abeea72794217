//! The daemon itself: ping, version, info.

use axum::Json;
use axum::extract::{Path, Query};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use serde_json::{Value, json};
use skep_api::NodeRole;
use skep_engine::{ContainerState, Image, LogDriver, RegistryConfig, cdi_devices, has_apparmor, host_name};

use super::json::or_null;
use super::{API_VERSION, ApiError, MINOR_MAX, MINOR_MIN, State};
use crate::VERSION;
use crate::config::{BUILT_IN_RUNTIME, Listener};
use crate::daemon::{Daemon, Reloadable};
use crate::swarm::memory_total;

/// What every answer says of who gives it.
const INTRODUCTION: [(&str, &str); 4] = [
    ("api-version", API_VERSION),
    ("server", concat!("Skep/", env!("CARGO_PKG_VERSION"), " (linux)")),
    ("ostype", "linux"),
    ("docker-experimental", "false"),
];

pub(super) async fn introduce(mut response: Response) -> Response {
    response
        .headers_mut()
        .extend(INTRODUCTION.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))));
    response
}

pub(super) async fn ping(state: State) -> (HeaderMap, &'static str) {
    let mut headers = HeaderMap::new();
    let swarm = match state.swarm.active().await {
        None if state.swarm.is_locked() => "locked",
        None => "inactive",
        Some(node) if node.manager().is_some() => "active/manager",
        Some(_) => "active/worker",
    };
    for (name, value) in [
        ("builder-version", "1"),
        ("swarm", swarm),
        ("cache-control", "no-cache, no-store, must-revalidate"),
        ("pragma", "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    (headers, "OK")
}

pub(super) async fn version() -> Json<Value> {
    let kernel = kernel_version();
    Json(json!({
        "Platform": {"Name": "Skep"},
        "Components": [{"Name": "Engine", "Version": VERSION, "Details": {
            "ApiVersion": API_VERSION, "MinAPIVersion": "1.24", "Os": "linux", "Arch": skep_engine::architecture(),
            "KernelVersion": kernel,
        }}],
        "Version": VERSION, "ApiVersion": API_VERSION, "MinAPIVersion": "1.24", "GitCommit": "", "GoVersion": "",
        "Os": "linux", "Arch": skep_engine::architecture(), "KernelVersion": kernel, "BuildTime": "",
    }))
}

fn kernel_version() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// A proxy's URL without the credentials that it may have.
fn masked(url: Option<&String>) -> String {
    let url = url.map_or("", String::as_str);
    match url.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1))) {
        Some((scheme, host)) => format!("{scheme}://xxxxx:xxxxx@{host}"),
        None => url.to_owned(),
    }
}

pub(super) async fn info(state: State) -> Json<Value> {
    let containers = state.engine.list();
    let running = containers.iter().filter(|c| matches!(c.state, ContainerState::Running(_))).count();
    let paused =
        containers.iter().filter(|c| matches!(&c.state, ContainerState::Running(running) if running.paused)).count();
    let Reloadable { registries, log_level } = state.in_force();
    let v2 = has_cgroups_v2();
    let labels: Vec<_> = state.config.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut info = json!({
        "ID": state.id, "Name": host_name(), "ServerVersion": VERSION,
        "Containers": containers.len(), "ContainersRunning": running - paused, "ContainersPaused": paused,
        "ContainersStopped": containers.len() - running, "Images": state.engine.images().len(),
        "Driver": state.engine.storage_driver().as_str(), "DriverStatus": [["Backing Filesystem", "the data root's"]],
        "Plugins": {"Volume": ["local"], "Network": ["bridge", "host", "macvlan", "null", "overlay"], "Authorization": null, "Log": LogDriver::NAMES},
        "CDISpecDirs": state.config.containers.cdi_dirs,
        "DiscoveredDevices": cdi_devices(&state.config.containers.cdi_dirs)
            .iter().map(|name| json!({"Source": "cdi", "ID": name})).collect::<Vec<_>>(),
        "LoggingDriver": state.config.log.driver.as_str(), "CgroupDriver": "cgroupfs", "CgroupVersion": if v2 { "2" } else { "1" },
        "NCPU": std::thread::available_parallelism().map_or(1, std::num::NonZero::get), "MemTotal": memory_total(),
        "RegistryConfig": registries_json(&registries),
        "DockerRootDir": state.engine.data_dir(), "Labels": labels, "Warnings": warnings(&state),
        "GenericResources": or_null(state.config.generic_resources.clone()),
        "Swarm": swarm_info(&state).await, "SecurityOptions": security_options(&state),
        "DefaultRuntime": state.config.default_runtime, "Runtimes": runtimes(&state),
    });
    let proxies = &registries.proxies;
    let fixed = json!({
        "MemoryLimit": true, "SwapLimit": false, "CpuCfsPeriod": true, "CpuCfsQuota": true, "CPUShares": true,
        "CPUSet": true, "PidsLimit": true, "IPv4Forwarding": true, "Debug": log_level == "debug", "OomKillDisable": false,
        "NFd": std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        "NGoroutines": tokio::runtime::Handle::current().metrics().num_alive_tasks(), "NEventsListener": 0, "SystemTime": skep_api::Timestamp::from_system(std::time::SystemTime::now()),
        "KernelVersion": kernel_version(), "OperatingSystem": operating_system(), "OSVersion": "", "OSType": "linux",
        "Architecture": std::env::consts::ARCH, "IndexServerAddress": "https://index.docker.io/v1/",
        "HttpProxy": masked(proxies.http.as_ref()), "HttpsProxy": masked(proxies.https.as_ref()),
        "NoProxy": proxies.none_for.clone().unwrap_or_default(), "ExperimentalBuild": false, "LiveRestoreEnabled": true,
        "Isolation": "",
        "InitBinary": "skep-init",
    });
    if let (Value::Object(info), Value::Object(fixed)) = (&mut info, fixed) {
        info.extend(fixed);
    }
    Json(info)
}

/// In dockerd's words.
fn warnings(state: &State) -> Vec<String> {
    let plain = state.config.listeners.iter().filter_map(|listener| match listener {
        Listener::Tcp(address) if state.config.tls.is_none() => Some(address),
        Listener::Tcp(_) | Listener::Unix(_) => None,
    });
    plain.map(|address| format!("WARNING: API is accessible on http://{address} without encryption.")).collect()
}

fn security_options(state: &State) -> Vec<&'static str> {
    let gain_nothing = state.config.no_new_privileges.then_some("name=no-new-privileges");
    let mapped = state.config.id_map.as_ref().map(|_| "name=userns");
    let apparmor = has_apparmor().then_some("name=apparmor");
    let always = ["name=seccomp,profile=builtin", "name=cgroupns"];
    apparmor.into_iter().chain(always).chain(mapped).chain(gain_nothing).collect()
}

fn runtimes(state: &State) -> Value {
    let own = (BUILT_IN_RUNTIME.to_owned(), json!({"path": "built in"}));
    let others = state
        .config
        .runtimes
        .values()
        .map(|runtime| (runtime.name.clone(), json!({"path": runtime.path, "runtimeArgs": runtime.args})));
    Value::Object(std::iter::once(own).chain(others).collect())
}

fn registries_json(registries: &RegistryConfig) -> Value {
    let insecure =
        |name: &String| (name.clone(), json!({"Name": name, "Mirrors": [], "Secure": false, "Official": false}));
    let mirrors: Vec<_> = registries.mirrors.iter().map(|url| format!("{}/", url.trim_end_matches('/'))).collect();
    let hub = json!({"Name": "docker.io", "Mirrors": mirrors, "Secure": true, "Official": true});
    let configs = registries.insecure.iter().map(insecure).chain([("docker.io".to_owned(), hub)]);
    let subnets = registries.insecure_subnets.iter().map(ToString::to_string);
    json!({
        "InsecureRegistryCIDRs": subnets.chain(["127.0.0.0/8".to_owned()]).collect::<Vec<_>>(),
        "Mirrors": mirrors, "IndexConfigs": configs.collect::<serde_json::Map<_, _>>(),
    })
}

/// Whether the host's cgroups are those of version 2.
pub(super) fn has_cgroups_v2() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// There are none, as managed plugins are not supported.
pub(super) async fn plugins() -> Json<Value> {
    Json(json!([]))
}

/// The kinds of things that take room on a disk.
const DISK_KINDS: [&str; 4] = ["container", "image", "volume", "build-cache"];

/// What images, containers, volumes and builds' caches take on disk, or those of them that are asked for (`type`).
pub(super) async fn disk_usage(
    state: State,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let kinds: Vec<String> = query.into_iter().filter(|(name, _)| name == "type").map(|(_, kind)| kind).collect();
    if let Some(unknown) = kinds.iter().find(|kind| !DISK_KINDS.contains(&kind.as_str())) {
        return Err(ApiError::bad_request(format!(
            "unknown object type {unknown}: there are {}",
            DISK_KINDS.join(", ")
        )));
    }
    let measured = tokio::task::spawn_blocking(move || {
        let asked = |kind: &str| kinds.is_empty() || kinds.iter().any(|asked| asked == kind);
        json!({
            "LayersSize": if asked("image") { state.engine.layers_size() } else { 0 },
            "Images": asked("image").then(|| images_usage(&state)),
            "Containers": asked("container").then(|| containers_usage(&state)),
            "Volumes": asked("volume").then(|| volumes_usage(&state)),
            "BuildCache": asked("build-cache").then(|| caches_usage(&state)),
        })
    });
    Ok(Json(measured.await.map_err(ApiError::internal)?))
}

fn images_usage(state: &Daemon) -> Vec<Value> {
    let row = |image: &Image| {
        let tags: Vec<_> = image.tags.iter().map(|tag| skep_engine::familiar(tag)).collect();
        json!({
            "Id": image.id, "ParentId": "", "RepoTags": tags, "RepoDigests": image.digests,
            "Created": image.created.as_nanos() / 1_000_000_000, "Size": image.size_bytes, "SharedSize": 0,
            "Labels": image.config.labels, "Containers": state.engine.image_users(&image.id).len(),
        })
    };
    state.engine.images().iter().map(row).collect()
}

fn containers_usage(state: &State) -> Vec<Value> {
    let linked = state.engine.link_names();
    let all = state.engine.list();
    let rows = all.iter().map(|container| {
        let mut row = super::containers::summary(&state.engine, container, &linked);
        let own = state.engine.container_size(&container.id);
        row["SizeRw"] = json!(own);
        row["SizeRootFs"] = json!(own + super::containers::image_size(state, container));
        row
    });
    rows.collect()
}

fn volumes_usage(state: &State) -> Vec<Value> {
    let all = state.engine.volumes();
    let rows = all.iter().map(|volume| {
        let mut row = super::volumes::volume_json(state, volume);
        let users = state.engine.volume_users(&volume.name).len();
        row["UsageData"] = json!({"Size": state.engine.volume_size(&volume.name), "RefCount": users});
        row
    });
    rows.collect()
}

fn caches_usage(state: &Daemon) -> Vec<Value> {
    let mounts = state.engine.build_caches().into_iter();
    let mounts = mounts.map(|cache| cache_json("exec.cachemount", "kept for RUN --mount=type=cache", cache));
    let contexts = state.build_kit.usage().into_iter();
    let contexts = contexts.map(|cache| cache_json("source.local", "a context, for the next build", cache));
    mounts.chain(contexts).collect()
}

/// What builds keep for the next ones: an id, and its bytes.
fn cache_json(kind: &str, what: &str, (id, bytes): (String, u64)) -> Value {
    json!({"ID": id, "Type": kind, "Description": what, "InUse": false, "Shared": false, "Size": bytes})
}

fn operating_system() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches('"').to_owned()
}

async fn swarm_info(daemon: &Daemon) -> Value {
    let Some(node) = daemon.swarm.active().await else {
        let local = if daemon.swarm.is_locked() { "locked" } else { "inactive" };
        return json!({"NodeID": "", "NodeAddr": "", "LocalNodeState": local, "ControlAvailable": false,
            "Error": "", "RemoteManagers": null});
    };
    let state = node.state();
    let managers: Vec<_> = state.managers.iter().map(|addr| json!({"NodeID": "", "Addr": addr})).collect();
    let addr = node.addr();
    let refused = node.is_refused().then(|| "the node was removed from its swarm".to_owned());
    let error = refused.or_else(|| node.manager_failure());
    let local = if error.is_some() { "error" } else { "active" };
    let mut info = json!({
        "NodeID": node.id(), "NodeAddr": addr, "LocalNodeState": local, "ControlAvailable": node.manager().is_some(),
        "Error": error.unwrap_or_default(),
        "RemoteManagers": managers,
    });
    if let Some(manager) = node.manager() {
        let tables = manager.view();
        info["Nodes"] = json!(tables.nodes.len());
        info["Managers"] = json!(tables.nodes.iter().filter(|node| node.role() == NodeRole::Manager).count());
        if let Some(cluster) = tables.cluster() {
            info["Cluster"] = super::swarm::cluster_json(cluster);
        }
    }
    info
}

/// A path that names a version which is not spoken.
pub(super) async fn unsupported_version(Path(version): Path<String>) -> ApiError {
    let minor: u32 = version.strip_prefix("1.").and_then(|minor| minor.parse().ok()).unwrap_or(u32::MAX);
    ApiError::bad_request(if minor < MINOR_MIN {
        format!(
            "client version {version} is too old. Minimum supported API version is 1.{MINOR_MIN}, please upgrade your \
             client to a newer version"
        )
    } else {
        format!(
            "client version {version} is too new. Maximum supported API version is 1.{MINOR_MAX}: set DOCKER_API_VERSION"
        )
    })
}
