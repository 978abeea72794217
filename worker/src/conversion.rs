//! From a task's spec to a container's configuration.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::time::Duration;

use skep_api::container::{AppArmorMode, HealthConfig, Mount, MountKind, SeccompMode};
use skep_api::expansion::{TemplateContext, TemplateNode};
use skep_api::task::Attachment;
use skep_api::units::Nanos;
use skep_api::{NodeId, Task};
use skep_engine::{
    ContainerConfig, ContainerMount, Device, HealthCheck, ImageConfig, JoinedNetwork, LogConfig, MountSource,
    NetworkMode, Payload, PublishedPort, ResourceLimits,
};

/// The label by which a container's task is known.
pub const TASK_ID_LABEL: &str = "com.docker.swarm.task.id";

/// Builds the container of `task` on `node`.
pub(crate) fn container_config(
    task: &Task,
    node: &TemplateNode,
    payloads: Vec<Payload>,
    volumes: &BTreeMap<String, PathBuf>,
    image: &ImageConfig,
    log: LogConfig,
) -> Result<ContainerConfig, String> {
    let filled = task.spec.container.filled(&TemplateContext::new(task, node)).map_err(|error| error.to_string())?;
    let spec = &filled;
    let privileges = spec.privileges.clone().unwrap_or_default();
    let seccomp = privileges.seccomp.unwrap_or_default();
    let custom = seccomp.custom()?.map(|profile| skep_engine::seccomp_profile(&profile)).transpose()?;
    let apparmor = privileges.apparmor.unwrap_or_default();
    if privileges.selinux.is_some_and(|context| context.names_any()) && skep_engine::has_selinux() {
        return Err(
            "the SELinux label cannot be given on this node, as SELinux is not supported yet: leave it out".into()
        );
    }
    let dns = spec.dns.clone().unwrap_or_default();
    let mounts: Vec<Mount> = spec.mounts.iter().map(|mount| located(mount, volumes)).collect();
    let (devices, mounts) = mounts.iter().partition::<Vec<_>, _>(|mount| is_block_device(mount));
    Ok(ContainerConfig {
        name: task.name(),
        image: spec.image.clone(),
        image_id: String::new(),
        entrypoint: spec.command.clone(),
        args: spec.args.clone(),
        env: [spec.env.clone(), skep_api::generic_resource::variables(&task.assigned)].concat(),
        working_dir: spec.dir.clone(),
        user: spec.user.clone(),
        groups: spec.groups.clone(),
        hostname: spec.hostname.clone(),
        labels: labels(task, node.id),
        mounts: mounts.into_iter().map(container_mount).collect(),
        devices: devices.into_iter().map(device).collect(),
        payloads,
        init: spec.init,
        read_only: spec.read_only,
        no_new_privileges: privileges.no_new_privileges,
        seccomp: seccomp.mode != SeccompMode::Unconfined,
        seccomp_profile: custom.unwrap_or_default(),
        apparmor: match apparmor.mode {
            AppArmorMode::Default => String::new(),
            AppArmorMode::Disabled => "unconfined".into(),
        },
        cap_add: spec.capability_add.clone(),
        cap_drop: spec.capability_drop.clone(),
        sysctls: spec.sysctls.clone(),
        ulimits: spec.ulimits.clone(),
        oom_score_adj: spec.oom_score_adj,
        limits: limits(task),
        stop_signal: spec.stop_signal.clone(),
        health: health_check(spec.healthcheck.as_ref(), image.healthcheck.as_ref()),
        hosts: spec.hosts.clone(),
        dns: dns.nameservers,
        dns_search: dns.search,
        dns_options: dns.options,
        network: network(task),
        ports: task.ports.iter().map(port).collect(),
        log,
        tty: spec.tty,
        open_stdin: spec.open_stdin,
        ..ContainerConfig::default()
    })
}

fn network(task: &Task) -> NetworkMode {
    let named = |name: &str| task.spec.networks.iter().any(|wanted| wanted.target == name);
    if !task.networks.is_empty() {
        let joined = |place: &Attachment| JoinedNetwork { id: place.network.to_string(), address: place.address };
        NetworkMode::Joined(task.networks.iter().map(joined).collect())
    } else if named("host") {
        NetworkMode::Host
    } else if named("none") {
        NetworkMode::None
    } else {
        NetworkMode::Bridge
    }
}

fn port(port: &skep_api::service::PortConfig) -> PublishedPort {
    PublishedPort {
        protocol: port.protocol,
        container_port: port.target_port,
        host_ip: None,
        host_port: port.published_port,
        host_port_last: 0,
    }
}

fn labels(task: &Task, node: NodeId) -> BTreeMap<String, String> {
    let mut labels = task.spec.container.labels.clone();
    for (key, value) in [
        ("com.docker.swarm.task", String::new()),
        (TASK_ID_LABEL, task.id.to_string()),
        ("com.docker.swarm.task.name", task.name()),
        ("com.docker.swarm.node.id", node.to_string()),
        ("com.docker.swarm.service.id", task.service_id.to_string()),
        ("com.docker.swarm.service.name", task.service_name.clone()),
    ] {
        labels.insert(key.to_owned(), value);
    }
    labels
}

/// The mount, from where the volume of the swarm is that it asks for.
fn located(mount: &Mount, volumes: &BTreeMap<String, PathBuf>) -> Mount {
    let source = volumes.get(&mount.target).filter(|_| mount.kind == MountKind::Cluster);
    let source = source.map_or_else(|| mount.source.clone(), |path| path.display().to_string());
    Mount { source, ..mount.clone() }
}

/// Whether it is a volume of the swarm that is no file system.
fn is_block_device(mount: &Mount) -> bool {
    let is_block = |found: std::fs::Metadata| found.file_type().is_block_device();
    mount.kind == MountKind::Cluster && std::fs::metadata(&mount.source).is_ok_and(is_block)
}

fn device(mount: &Mount) -> Device {
    let access = if mount.read_only { "r" } else { "rwm" };
    Device { host_path: mount.source.clone(), path: mount.target.clone(), access: access.to_owned() }
}

/// A mount as the engine takes it; a volume of the swarm comes from where it is on the host.
#[must_use]
pub fn container_mount(mount: &Mount) -> ContainerMount {
    let source = match mount.kind {
        MountKind::Bind | MountKind::Cluster => MountSource::Bind {
            path: mount.source.clone(),
            propagation: mount.bind_options.clone().unwrap_or_default().propagation,
            alone: mount.bind_options.as_ref().is_some_and(|options| options.non_recursive),
            writable_below: false,
        },
        MountKind::Volume => {
            let options = mount.volume_options.clone().unwrap_or_default();
            MountSource::Volume {
                name: mount.source.clone(),
                labels: options.labels,
                options: options.driver_config.map(|driver| driver.options).unwrap_or_default(),
                no_copy: options.no_copy,
                subpath: options.subpath,
            }
        }
        MountKind::Image => MountSource::Image {
            image: mount.source.clone(),
            image_id: String::new(),
            layers: Vec::new(),
            subpath: mount.image_options.clone().unwrap_or_default().subpath,
        },
        MountKind::Tmpfs => {
            let options = mount.tmpfs_options.clone().unwrap_or_default();
            let size_bytes = (!options.size_bytes.is_zero()).then_some(options.size_bytes.0);
            MountSource::Tmpfs { size_bytes, mode: options.mode, options: Vec::new() }
        }
    };
    ContainerMount { source, target: mount.target.clone(), read_only: mount.read_only }
}

fn limits(task: &Task) -> ResourceLimits {
    let limits = task.spec.resources.limits.clone().unwrap_or_default();
    let reserved = task.spec.resources.reserved();
    ResourceLimits {
        nano_cpus: limits.nano_cpus.0,
        cpu_shares: u64::try_from(reserved.nano_cpus.0 * 1024 / 1_000_000_000).unwrap_or(0),
        memory_bytes: limits.memory_bytes.0,
        memory_reservation_bytes: reserved.memory_bytes.0,
        pids: limits.pids,
        ..ResourceLimits::default()
    }
}

/// The check in force: the container's own, where it says something, over the image's.
#[must_use]
pub fn health_check(service: Option<&HealthConfig>, image: Option<&HealthConfig>) -> Option<HealthCheck> {
    let (own, image) = (service.cloned().unwrap_or_default(), image.cloned().unwrap_or_default());
    let test = if own.test.is_empty() { image.test } else { own.test };
    let command = match test.split_first() {
        None => return None,
        Some((kind, _)) if kind == "NONE" => return None,
        Some((kind, rest)) if kind == "CMD" => rest.to_vec(),
        Some((kind, rest)) if kind == "CMD-SHELL" => {
            ["/bin/sh", "-c"].into_iter().map(str::to_owned).chain(rest.iter().cloned()).collect()
        }
        Some(_) => test,
    };
    let time = |own: Nanos, image: Nanos, default: u64| {
        let set = if own.is_zero() { image } else { own };
        if set.is_zero() { Duration::from_secs(default) } else { set.duration() }
    };
    let retries = if own.retries == 0 { image.retries } else { own.retries };
    Some(HealthCheck {
        command,
        interval: time(own.interval, image.interval, 30),
        timeout: time(own.timeout, image.timeout, 30),
        retries: u32::try_from(retries).ok().filter(|&retries| retries > 0).unwrap_or(3),
        start_period: time(own.start_period, image.start_period, 0),
        start_interval: time(own.start_interval, image.start_interval, 5),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_s_check_overrides_the_image_s_and_none_switches_it_off() {
        let config = |test: &[&str], interval: i64| HealthConfig {
            test: test.iter().map(|&t| t.into()).collect(),
            interval: Nanos::from_secs(interval),
            ..HealthConfig::default()
        };
        assert_eq!(health_check(None, None), None);
        assert_eq!(health_check(Some(&config(&["NONE"], 0)), Some(&config(&["CMD", "a"], 0))), None);
        let check = health_check(Some(&config(&[], 7)), Some(&config(&["CMD-SHELL", "test -f /ok"], 9))).unwrap();
        assert_eq!(check.command, ["/bin/sh", "-c", "test -f /ok"]);
        assert_eq!((check.interval, check.retries), (Duration::from_secs(7), 3));
    }
}
