//! Containers as the Engine API tells of them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};
use skep_api::Timestamp;
use skep_engine::{
    ContainerConfig, ContainerMount, ContainerState, DEFAULT_NETWORK, Endpoint, Engine, HealthStatus, Inspection,
    JoinedNetwork, KeptNetwork, Link, LocalNetwork, MountSource, NamespaceMode, NetworkMode, PublishedPort,
    StorageDriver, WantedPlace, familiar,
};

use super::mounts::clean_target;
use crate::config::BUILT_IN_RUNTIME;

/// What is known of a container's health. One that has a check and runs no more is not healthy, as Docker says it.
pub(super) fn health_of(container: &Inspection) -> HealthStatus {
    match &container.state {
        ContainerState::Running(running) => running.health,
        ContainerState::Restarting(_) | ContainerState::Exited(_) if container.config.health.is_some() => {
            HealthStatus::Unhealthy
        }
        ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_) => HealthStatus::None,
    }
}

fn ports(state: &ContainerState) -> &[PublishedPort] {
    match state {
        ContainerState::Running(running) => &running.ports,
        ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_) => &[],
    }
}

/// The host's addresses that a container's port is served at: all of a kind, or the one that was asked for, where the
/// container can be reached from those.
fn served_at(engine: &Engine, container: &Inspection, port: &PublishedPort) -> Vec<IpAddr> {
    let places = container.state.endpoints();
    // What is not this host's is reached by IPv4 as well.
    let by_v4 = |held: &Endpoint| held.address.is_some() && engine.leads_ports(&held.network, false);
    let by_v6 = |held: &Endpoint| held.address_v6.is_some() && engine.leads_ports(&held.network, true);
    let has_v6 = places.iter().any(|held| held.address_v6.is_some());
    let v4 = places.is_empty() || places.iter().any(by_v4);
    let passed_on = !has_v6 && engine.passes_on_ipv6() && places.iter().any(by_v4);
    let v6 = passed_on || places.iter().any(by_v6);
    let asked = port.host_ip.map_or_else(|| vec![UNSPECIFIED_V4, UNSPECIFIED_V6], |address| vec![address]);
    asked.into_iter().filter(|address| if address.is_ipv6() { v6 } else { v4 }).collect()
}

const UNSPECIFIED_V4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const UNSPECIFIED_V6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// One row of a list; `linked` are the names that others have for containers.
pub(in crate::http) fn summary(
    engine: &Engine,
    container: &Inspection,
    linked: &BTreeMap<String, Vec<String>>,
) -> Value {
    let config = &container.config;
    let mut listed: Vec<_> = ports(&container.state)
        .iter()
        .flat_map(|port| served_at(engine, container, port).into_iter().map(move |ip| (ip, port)))
        .map(|(ip, port)| {
            json!({"IP": ip, "PrivatePort": port.container_port, "PublicPort": port.host_port,
            "Type": port.protocol.as_str()})
        })
        .collect();
    if matches!(container.state, ContainerState::Running(_)) {
        let unpublished = config.exposed_ports.iter().filter_map(|key| {
            let (number, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
            let number: u16 = number.parse().ok()?;
            let published = ports(&container.state).iter().any(|port| port.container_port == number);
            (!published).then(|| json!({"PrivatePort": number, "Type": protocol}))
        });
        listed.extend(unpublished);
    }
    // A name that stands for another image by now would mislead.
    let named = engine.image(&config.image).is_ok_and(|image| image.id == config.image_id);
    let image = if named { familiar(&config.image) } else { &config.image_id };
    let linked = linked.get(&container.id).into_iter().flatten();
    let names: Vec<_> = std::iter::once(&config.name).chain(linked).map(|name| format!("/{name}")).collect();
    json!({
        "Id": container.id, "Names": names, "Image": image,
        "ImageID": config.image_id, "Command": config.command().join(" "),
        "Created": container.created.as_nanos() / 1_000_000_000, "Ports": listed, "Labels": config.labels,
        "State": container.state.as_str(), "Status": status_text(&container.state),
        "HostConfig": {"NetworkMode": network_mode(container)},
        "NetworkSettings": {"Networks": networks(engine, container)}, "Mounts": mounts(engine, container),
    })
}

/// `Up 5 minutes (healthy)`, `Exited (0) 3 hours ago`.
fn status_text(state: &ContainerState) -> String {
    let now = Timestamp::from_system(std::time::SystemTime::now());
    let ago = |at: Timestamp| roughly(now.since(at));
    match state {
        ContainerState::Created => "Created".into(),
        ContainerState::Running(running) => {
            let health = match running.health {
                _ if running.paused => " (Paused)".into(),
                HealthStatus::None => String::new(),
                HealthStatus::Starting => " (health: starting)".into(),
                HealthStatus::Healthy | HealthStatus::Unhealthy => format!(" ({})", running.health.as_str()),
            };
            format!("Up {}{health}", ago(running.started_at))
        }
        ContainerState::Restarting(exit) => format!("Restarting ({}) {} ago", exit.code, ago(exit.finished_at)),
        ContainerState::Exited(exit) => format!("Exited ({}) {} ago", exit.code, ago(exit.finished_at)),
    }
}

fn roughly(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => "Less than a second".into(),
        1 => "1 second".into(),
        2..=59 => format!("{seconds} seconds"),
        60..=119 => "About a minute".into(),
        120..=3599 => format!("{} minutes", seconds / 60),
        3600..=7199 => "About an hour".into(),
        7200..=172_799 => format!("{} hours", seconds / 3600),
        172_800..=1_209_599 => format!("{} days", seconds / 86_400),
        _ => format!("{} weeks", seconds / 604_800),
    }
}

/// All that is told of one.
pub(super) fn whole(engine: &Engine, container: &Inspection) -> Value {
    let config = &container.config;
    let command = config.command();
    let state_json = state_json(container);
    let mut value = json!({
        "Id": container.id, "Created": container.created, "Path": command.first().map_or("", String::as_str),
        "Args": command.get(1..).unwrap_or_default(), "State": state_json,
        "Image": config.image_id, "Name": format!("/{}", config.name), "RestartCount": container.restarts,
        "Driver": config.storage.as_str(), "Platform": "linux", "LogPath": container.log_path.clone().unwrap_or_default(),
        "ResolvConfPath": container.data_dir.join("resolv.conf"),
        "HostnamePath": container.data_dir.join("hostname"), "HostsPath": container.data_dir.join("hosts"),
        "MountLabel": "", "ProcessLabel": "", "AppArmorProfile": config.apparmor_profile().unwrap_or_default(),
        "ExecIDs": if container.execs.is_empty() { Value::Null } else { json!(container.execs) },
        "GraphDriver": {"Name": config.storage.as_str(), "Data": graph_data(container)},
        "Mounts": mounts(engine, container),
    });
    value["Config"] = config_json(container);
    // Also one that says that there is to be none.
    if config.health.is_some() || config.request.pointer("/Healthcheck/Test").is_some_and(|test| *test != json!([])) {
        value["Config"]["Healthcheck"] = health_check(engine, container);
    }
    value["HostConfig"] = host_config(container);
    if config.network == NetworkMode::Bridge {
        value["HostConfig"]["Links"] = if config.links.is_empty() { Value::Null } else { links(engine, config) };
    }
    value["NetworkSettings"] = network_settings(engine, container);
    value
}

/// `/NAME:/OWNER/ALIAS` of each.
fn links(engine: &Engine, config: &ContainerConfig) -> Value {
    let link = |link: &Link| {
        let name =
            engine.inspect(&link.container).map_or_else(|_| link.container.clone(), |other| other.config.name.clone());
        json!(format!("/{name}:/{}/{}", config.name, link.alias))
    };
    config.links.iter().map(link).collect()
}

fn graph_data(container: &Inspection) -> Value {
    let root = container.data_dir.join("rootfs");
    match container.config.storage {
        StorageDriver::Overlay2 => json!({
            "UpperDir": container.data_dir.join("diff"), "MergedDir": root,
            "WorkDir": container.data_dir.join("work"), "LowerDir": container.layer_dirs.join(":"),
        }),
        StorageDriver::Vfs | StorageDriver::Btrfs => json!({"MergedDir": root}),
    }
}

fn config_json(container: &Inspection) -> Value {
    let config = &container.config;
    let asked = |pointer: &str| container.config.request.pointer(pointer).cloned().unwrap_or_default();
    let set = |keys: &[String]| -> Map<String, Value> { keys.iter().map(|key| (key.clone(), json!({}))).collect() };
    let volumes: Vec<String> =
        config.mounts.iter().filter(|mount| is_anonymous(mount)).map(|mount| mount.target.clone()).collect();
    let mut value = json!({
        "Hostname": config.hostname, "Domainname": config.domainname, "User": config.user, "Env": config.env,
        "Cmd": if config.args.is_empty() { Value::Null } else { json!(config.args) },
        "Entrypoint": if config.entrypoint.is_empty() { Value::Null } else { json!(config.entrypoint) },
        "Image": familiar(&config.image), "WorkingDir": config.working_dir,
        "Labels": config.labels, "Tty": config.tty, "OpenStdin": config.open_stdin,
        "StdinOnce": config.stdin_once, "OnBuild": null,
        "AttachStdin": asked("/AttachStdin") == Value::Bool(true),
        "AttachStdout": asked("/AttachStdout") == Value::Bool(true),
        "AttachStderr": asked("/AttachStderr") == Value::Bool(true),
        "Volumes": if volumes.is_empty() { Value::Null } else { Value::Object(set(&volumes)) },
    });
    if !config.exposed_ports.is_empty() {
        value["ExposedPorts"] = Value::Object(set(&config.exposed_ports));
    }
    if !config.stop_signal.is_empty() {
        value["StopSignal"] = json!(config.stop_signal);
    }
    if let Some(timeout) = config.stop_timeout {
        value["StopTimeout"] = json!(timeout.as_secs());
    }
    value
}

/// The check as it was asked for, with what the image says where nothing was.
fn health_check(engine: &Engine, container: &Inspection) -> Value {
    let own = container.config.request.pointer("/Healthcheck").and_then(Value::as_object).cloned();
    let image = engine.image(&container.config.image_id).ok().and_then(|image| image.config.healthcheck);
    let image = image.and_then(|check| serde_json::to_value(check).ok());
    let image = image.as_ref().and_then(Value::as_object).cloned();
    match (own, image, &container.config.health) {
        (None, None, Some(check)) => {
            let test: Vec<_> = std::iter::once("CMD").chain(check.command.iter().map(String::as_str)).collect();
            let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
            json!({
                "Test": test, "Interval": nanos(check.interval), "Timeout": nanos(check.timeout),
                "Retries": check.retries, "StartPeriod": nanos(check.start_period),
            })
        }
        (own, image, _) => {
            let mut whole = image.unwrap_or_default();
            let says = |value: &Value| !value.is_null() && *value != json!(0) && *value != json!([]);
            whole.extend(own.into_iter().flatten().filter(|(_, value)| says(value)));
            Value::Object(whole)
        }
    }
}

fn is_anonymous(mount: &ContainerMount) -> bool {
    matches!(&mount.source, MountSource::Volume { name, .. } if name.len() == 64)
}

fn network_mode(container: &Inspection) -> Value {
    match container.config.request.pointer("/HostConfig/NetworkMode") {
        Some(Value::String(mode)) if !mode.is_empty() && mode != "default" => json!(mode),
        _ => json!(container.config.network.name()),
    }
}

/// By the name that it was asked for, if the built-in runtime answers to it.
fn runtime(config: &ContainerConfig) -> &str {
    let asked = config.request.pointer("/HostConfig/Runtime").and_then(Value::as_str);
    let built_in = asked.filter(|name| !name.is_empty()).unwrap_or(BUILT_IN_RUNTIME);
    config.runtime.as_ref().map_or(built_in, |runtime| &runtime.name)
}

/// The members of a `HostConfig` that clients expect to find, asking for nothing.
const HOST_CONFIG: &str = r#"{
"Binds": null, "ContainerIDFile": "", "PortBindings": {}, "VolumeDriver": "", "VolumesFrom": null,
"ConsoleSize": [0, 0], "CapAdd": null, "CapDrop": null, "Dns": [],
"DnsOptions": [], "DnsSearch": [], "ExtraHosts": null, "GroupAdd": null, "IpcMode": "private",
"Cgroup": "", "Links": null, "OomScoreAdj": 0, "PidMode": "", "Privileged": false,
"PublishAllPorts": false, "SecurityOpt": null, "UTSMode": "", "UsernsMode": "", "Runtime": "",
"Isolation": "", "CpuShares": 0, "CgroupParent": "", "BlkioWeight": 0, "BlkioWeightDevice": [],
"BlkioDeviceReadBps": [], "BlkioDeviceWriteBps": [], "BlkioDeviceReadIOps": [],
"BlkioDeviceWriteIOps": [], "CpuPeriod": 0, "CpuQuota": 0, "CpuRealtimePeriod": 0,
"CpuRealtimeRuntime": 0, "CpusetCpus": "", "CpusetMems": "", "Devices": [], "DeviceCgroupRules": null,
"DeviceRequests": null, "MemoryReservation": 0, "MemorySwap": 0, "MemorySwappiness": null,
"OomKillDisable": false, "PidsLimit": null, "Ulimits": [], "CpuCount": 0, "CpuPercent": 0,
"IOMaximumIOps": 0, "IOMaximumBandwidth": 0
}"#;

/// What was asked for, completed by what is in force.
fn host_config(container: &Inspection) -> Value {
    let config = &container.config;
    let limits = &config.limits;
    let mut value: Value = serde_json::from_str(HOST_CONFIG).expect("the text is JSON");
    if let (Some(all), Some(asked)) =
        (value.as_object_mut(), config.request.pointer("/HostConfig").and_then(Value::as_object))
    {
        // Clients say nothing by an empty text, too.
        let said = asked.iter().filter(|(_, member)| *member != "");
        all.extend(said.map(|(key, member)| (key.clone(), member.clone())));
    }
    let in_force = json!({
        "NetworkMode": network_mode(container), "ReadonlyRootfs": config.read_only, "Init": config.init,
        "Memory": limits.memory_bytes, "NanoCpus": limits.nano_cpus, "CpuShares": limits.cpu_shares,
        "PidsLimit": if limits.pids > 0 { json!(limits.pids) } else { Value::Null },
        "MemoryReservation": limits.memory_reservation_bytes, "MemorySwap": limits.memory_swap_bytes,
        "CpuPeriod": limits.cpu_period_micros, "CpuQuota": limits.cpu_quota_micros,
        "CpusetCpus": limits.cpuset_cpus, "CpusetMems": limits.cpuset_mems,
        "BlkioWeight": limits.blkio_weight, "AutoRemove": config.auto_remove,
        "RestartPolicy": {"Name": config.restart.as_str(), "MaximumRetryCount": config.restart.retries_max()},
        "ShmSize": config.shm_size_bytes(),
        "MaskedPaths": config.masked_paths(), "ReadonlyPaths": config.read_only_paths(),
        "CgroupnsMode": if config.cgroup_mode == NamespaceMode::Host { "host" } else { "private" },
        "LogConfig": {"Type": config.log.driver.as_str(), "Config": config.log.options},
        "Runtime": runtime(config),
    });
    if let (Some(all), Value::Object(in_force)) = (value.as_object_mut(), in_force) {
        all.extend(in_force);
        if config.request.is_null() {
            all.extend([
                ("Mounts".to_owned(), config.mounts.iter().map(mount_of_task).collect()),
                ("CapAdd".to_owned(), json!(config.cap_add)),
                ("CapDrop".to_owned(), json!(config.cap_drop)),
                ("Sysctls".to_owned(), json!(config.sysctls)),
                ("Ulimits".to_owned(), json!(config.ulimits)),
            ]);
        }
    }
    value
}

/// A mount as the service asks for it.
fn mount_of_task(mount: &ContainerMount) -> Value {
    let mut value = json!({"Target": mount.target});
    if mount.read_only {
        value["ReadOnly"] = json!(true);
    }
    match &mount.source {
        MountSource::Bind { path, propagation, .. } => {
            value["Type"] = json!("bind");
            value["Source"] = json!(path);
            if !propagation.is_empty() {
                value["BindOptions"] = json!({"Propagation": propagation});
            }
        }
        MountSource::Volume { name, labels, no_copy, subpath, .. } => {
            value["Type"] = json!("volume");
            value["Source"] = json!(name);
            for (member, asked) in [("Labels", json!(labels)), ("NoCopy", json!(no_copy)), ("Subpath", json!(subpath))]
            {
                if asked != json!({}) && asked != json!(false) && asked != json!("") {
                    value["VolumeOptions"][member] = asked;
                }
            }
        }
        MountSource::Image { image, .. } => {
            value["Type"] = json!("image");
            value["Source"] = json!(image);
        }
        MountSource::Tmpfs { size_bytes, mode, .. } => {
            value["Type"] = json!("tmpfs");
            if size_bytes.is_some() || mode.is_some() {
                value["TmpfsOptions"] = json!({"SizeBytes": size_bytes.unwrap_or(0), "Mode": mode.unwrap_or(0)});
            }
        }
    }
    value
}

fn network_settings(engine: &Engine, container: &Inspection) -> Value {
    let mut bindings = Map::new();
    for port in ports(&container.state) {
        let key = format!("{}/{}", port.container_port, port.protocol.as_str());
        let served = served_at(engine, container, port);
        let served = served.iter().map(|ip| json!({"HostIp": ip, "HostPort": port.host_port.to_string()}));
        if let Value::Array(list) = bindings.entry(key).or_insert_with(|| json!([])) {
            list.extend(served);
        }
    }
    if matches!(container.state, ContainerState::Running(_)) {
        for key in &container.config.exposed_ports {
            bindings.entry(key.clone()).or_insert(Value::Null);
        }
    }
    let networks = networks(engine, container);
    let first = networks.as_object().and_then(|all| all.values().next()).cloned().unwrap_or_default();
    let of_first = |key: &str| first.get(key).cloned().unwrap_or_else(|| json!(""));
    let number_of_first = |key: &str| first.get(key).cloned().unwrap_or_else(|| json!(0));
    let running = matches!(container.state, ContainerState::Running(_));
    json!({
        "Bridge": "", "SandboxID": if running { container.id.as_str() } else { "" },
        "SandboxKey": container.netns.as_deref().filter(|_| running).unwrap_or_else(|| Path::new("")), "HairpinMode": false,
        "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0, "SecondaryIPAddresses": null,
        "SecondaryIPv6Addresses": null, "EndpointID": of_first("EndpointID"), "Gateway": of_first("Gateway"),
        "GlobalIPv6Address": of_first("GlobalIPv6Address"), "GlobalIPv6PrefixLen": number_of_first("GlobalIPv6PrefixLen"),
        "IPAddress": of_first("IPAddress"),
        "IPPrefixLen": number_of_first("IPPrefixLen"),
        "IPv6Gateway": of_first("IPv6Gateway"), "MacAddress": of_first("MacAddress"), "Ports": bindings, "Networks": networks,
    })
}

/// Its places in networks, by the networks' names.
fn networks(engine: &Engine, container: &Inspection) -> Value {
    let running = match &container.state {
        ContainerState::Running(running) => Some(running),
        ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_) => None,
    };
    let default = [WantedPlace { network: DEFAULT_NETWORK.into(), ..WantedPlace::default() }];
    let places = match &container.config.network {
        NetworkMode::Bridge => &default[..],
        NetworkMode::Local(places) => places,
        NetworkMode::Host => return json!({"host": endpoint(0)}),
        NetworkMode::None => return json!({"none": endpoint(0)}),
        NetworkMode::Container(_) => return json!({}),
        NetworkMode::Joined(joined) => {
            return Value::Object(joined.iter().map(|place| planned_place(engine, place)).collect());
        }
    };
    let place = |place: &WantedPlace| {
        let held = running.and_then(|running| {
            let is_held = |held: &&Endpoint| {
                held.network == place.network
                    || held.grant.as_ref().is_some_and(|grant| grant.network_name == place.network)
            };
            running.endpoints.iter().find(is_held)
        });
        let network = engine.network(&place.network).ok();
        let granted = held.and_then(|held| held.grant.as_ref());
        let name = network.as_ref().map(|network| &network.name).or_else(|| granted.map(|grant| &grant.network_name));
        let mut value = endpoint(place.gateway_priority);
        value["NetworkID"] = json!(crate::http::networks::predefined_id(&place.network));
        if !place.aliases.is_empty() {
            value["Aliases"] = json!(place.aliases);
        }
        if !place.links.is_empty() {
            value["Links"] = place.links.iter().map(|(alias, name)| json!(format!("{name}:{alias}"))).collect();
        }
        if place.address.is_some() || place.address_v6.is_some() || !place.link_local.is_empty() {
            value["IPAMConfig"] = ipam_config(place);
        }
        if !place.driver_options.is_empty() {
            value["DriverOpts"] = json!(place.driver_options);
        }
        if let Some(mac) = held.and_then(|held| held.mac).or(place.mac) {
            value["MacAddress"] = json!(mac);
        }
        if let Some(held) = held {
            describe_held(&mut value, engine, &container.id, held, network.as_ref());
        }
        (name.unwrap_or(&place.network).clone(), value)
    };
    Value::Object(places.iter().map(place).collect())
}

/// Says of a place what a running container has there; `network` is known if it is this host's.
fn describe_held(value: &mut Value, engine: &Engine, container: &str, held: &Endpoint, network: Option<&LocalNetwork>) {
    let granted = held.grant.as_ref();
    value["IPAddress"] = held.address.map_or_else(|| json!(""), |address| json!(address));
    value["EndpointID"] = json!(endpoint_id(container, &held.network));
    if held.network != DEFAULT_NETWORK {
        value["DNSNames"] = json!(held.names);
    }
    let outward = network.filter(|network| !network.internal);
    let gateway = outward.and_then(|network| network.v4.as_ref()).map(|v4| v4.gateway);
    if let Some(gateway) = gateway.or_else(|| granted.and_then(|grant| grant.gateway)) {
        value["Gateway"] = json!(gateway);
    }
    let v6 = network.and_then(|network| network.v6.as_ref());
    if let (Some(address), Some(v6)) = (held.address_v6, v6) {
        value["GlobalIPv6Address"] = json!(address);
        value["GlobalIPv6PrefixLen"] = json!(v6.subnet.prefix_len());
        if outward.is_some() {
            value["IPv6Gateway"] = json!(v6.gateway);
        }
    }
    let v4 = network.and_then(|network| network.v4.as_ref()).map(|v4| v4.subnet.prefix_len());
    value["IPPrefixLen"] = json!(v4.or_else(|| granted.map(|grant| grant.prefix_len)).unwrap_or(0));
    let kept = engine.kept_network(&held.network).filter(|_| granted.is_some());
    if let (Some(kept), Some(address)) = (kept, held.address) {
        describe_kept(value, &kept, address);
    }
}

/// A place that was planned with the container, and its network's name.
fn planned_place(engine: &Engine, place: &JoinedNetwork) -> (String, Value) {
    let kept = engine.kept_network(&place.id);
    let mut value = endpoint(0);
    value["NetworkID"] = json!(place.id);
    value["IPAddress"] = json!(place.address);
    if let Some(kept) = &kept {
        describe_kept(&mut value, kept, place.address);
    }
    (kept.map_or_else(|| place.id.clone(), |kept| kept.name), value)
}

/// Says of a place what follows from its network, which somebody else keeps.
fn describe_kept(value: &mut Value, network: &KeptNetwork, address: Ipv4Addr) {
    value["IPPrefixLen"] = json!(network.subnet.prefix_len());
    if !network.internal {
        value["Gateway"] = json!(network.gateway);
    }
    if let Some(side) = network.v6 {
        value["GlobalIPv6Address"] = json!(side.address(network.subnet, address));
        value["GlobalIPv6PrefixLen"] = json!(side.subnet.prefix_len());
        if !network.internal {
            value["IPv6Gateway"] = json!(side.gateway);
        }
    }
}

fn ipam_config(place: &WantedPlace) -> Value {
    let mut config = json!({});
    if let Some(address) = place.address {
        config["IPv4Address"] = json!(address);
    }
    if let Some(address) = place.address_v6 {
        config["IPv6Address"] = json!(address);
    }
    if !place.link_local.is_empty() {
        config["LinkLocalIPs"] = json!(place.link_local);
    }
    config
}

/// Names a container's place in a network.
pub(in crate::http) fn endpoint_id(container: &str, network: &str) -> String {
    format!("{:.32}{:.32}", container, format!("{network:0<32}"))
}

fn endpoint(gateway_priority: i64) -> Value {
    json!({
        "IPAMConfig": null, "Links": null, "Aliases": null, "MacAddress": "", "DriverOpts": null, "GwPriority": gateway_priority,
        "NetworkID": "", "EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "",
        "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "DNSNames": null,
    })
}

/// What is mounted, but for what the request calls tmpfs by its own member: clients find that there.
fn mounts(engine: &Engine, container: &Inspection) -> Vec<Value> {
    let asked = |member: &str| container.config.request.pointer("/HostConfig").and_then(|host| host.get(member));
    let by_member = |mount: &&ContainerMount| {
        let tmpfs = asked("Tmpfs").and_then(Value::as_object);
        tmpfs.is_some_and(|all| all.keys().any(|target| clean_target(target) == mount.target))
    };
    let binds: Vec<_> =
        asked("Binds").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    // As it was written: `SOURCE:TARGET:MODE`.
    let mode = |target: &str| {
        let parts = binds.iter().map(|text| text.split(':').collect::<Vec<_>>());
        let own = parts.into_iter().find(|parts| parts.get(1).is_some_and(|&at| clean_target(at) == target));
        own.and_then(|parts| parts.get(2).copied())
    };
    let mount = |mount: &ContainerMount| {
        let (target, rw) = (&mount.target, !mount.read_only);
        match &mount.source {
            MountSource::Bind { path, propagation, .. } => {
                let propagation = if propagation.is_empty() { "rprivate" } else { propagation };
                json!({"Type": "bind", "Source": path, "Destination": target, "Mode": mode(target).unwrap_or_default(),
                    "RW": rw, "Propagation": propagation})
            }
            MountSource::Volume { name, .. } => json!({
                "Type": "volume", "Name": name, "Source": engine.volume_dir(name), "Destination": target,
                "Driver": "local", "Mode": mode(target).unwrap_or("z"), "RW": rw, "Propagation": "",
            }),
            MountSource::Image { image, .. } => json!({"Type": "image", "Source": image, "Destination": target,
                "Mode": "", "RW": rw, "Propagation": ""}),
            MountSource::Tmpfs { .. } => json!({"Type": "tmpfs", "Source": "", "Destination": target, "Mode": "",
                "RW": rw, "Propagation": ""}),
        }
    };
    container.config.mounts.iter().filter(|mount| !by_member(mount)).map(mount).collect()
}

/// As clients expect it that are older than the API's version 1.44.
pub(super) fn tell_short_id_among_aliases(value: &mut Value) {
    let id: String = value["Id"].as_str().unwrap_or_default().chars().take(12).collect();
    let Some(networks) = value["NetworkSettings"]["Networks"].as_object_mut() else { return };
    // The default one has no names.
    for (_, endpoint) in networks.iter_mut().filter(|(name, _)| !matches!(name.as_str(), "bridge" | "host" | "none")) {
        match &mut endpoint["Aliases"] {
            Value::Array(aliases) if !aliases.contains(&json!(id)) => aliases.push(json!(id)),
            Value::Array(_) => {}
            none => *none = json!([id]),
        }
    }
}

fn state_json(container: &Inspection) -> Value {
    let state = &container.state;
    let never = Timestamp::NEVER;
    let (pid, code, oom, error, started, finished) = match state {
        ContainerState::Created => (0, 0, false, "", never, never),
        ContainerState::Running(running) => (running.pid, 0, false, "", running.started_at, never),
        ContainerState::Restarting(exit) | ContainerState::Exited(exit) => {
            (0, exit.code, exit.oom_killed, exit.error.as_str(), exit.started_at, exit.finished_at)
        }
    };
    let restarting = matches!(state, ContainerState::Restarting(_));
    let mut value = json!({
        "Status": state.as_str(), "Running": restarting || matches!(state, ContainerState::Running(_)),
        "Paused": matches!(state, ContainerState::Running(running) if running.paused),
        "Restarting": restarting, "OOMKilled": oom, "Dead": false, "Pid": pid, "ExitCode": code, "Error": error,
        "StartedAt": started, "FinishedAt": finished,
    });
    let health = health_of(container);
    if health != HealthStatus::None {
        let log: Vec<_> = container
            .probes
            .iter()
            .map(|probe| {
                json!({"Start": probe.started_at, "End": probe.ended_at, "ExitCode": probe.code, "Output": probe.output})
            })
            .collect();
        value["Health"] = json!({"Status": health.as_str(), "FailingStreak": container.failing_streak, "Log": log});
    }
    value
}
