//! Services: what a user declares, and the swarm keeps running.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::constraint::{Constraint, ParseConstraintError};
use crate::generic_resource;
use crate::id::{NetworkId, ServiceId};
use crate::mode::{JobStatus, ServiceMode};
use crate::name::{NameError, check_service_name};
use crate::object::Meta;
use crate::task::{Resources, TaskSpec};
use crate::timestamp::Timestamp;
use crate::units::Nanos;

/// The most replicas, or completions, that a service may ask for.
pub const REPLICAS_MAX: u64 = 1_000_000;
const NANO_CPUS_MIN: i64 = 1_000_000;
const MEMORY_BYTES_MIN: i64 = 4 << 20;

/// What a user declares of a service.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServiceSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub task_template: Arc<TaskSpec>,
    pub mode: ServiceMode,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_config: Option<UpdateConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback_config: Option<UpdateConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_spec: Option<EndpointSpec>,
}

/// How tasks are renewed when the spec changes.
#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UpdateConfig {
    /// Slots renewed at a time; all at once if zero.
    pub parallelism: u64,
    /// Between one batch and the next.
    pub delay: Nanos,
    pub failure_action: FailureAction,
    /// How long a new task is watched after it runs; 5 s if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor: Option<Nanos>,
    /// Failures beyond this share of the slots are too many.
    #[serde(serialize_with = "as_written")]
    pub max_failure_ratio: f32,
    pub order: UpdateOrder,
}

/// In as few digits as tell it from its neighbours, which a detour over 64 bits would add to.
fn as_written<S: serde::Serializer>(number: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(number.to_string().parse().unwrap_or_default())
}

impl Default for UpdateConfig {
    /// What a sent but partly filled config means; what an absent one means is [`Self::ABSENT`].
    fn default() -> Self {
        Self { parallelism: 0, ..Self::ABSENT }
    }
}

impl UpdateConfig {
    pub const MONITOR_DEFAULT: Nanos = Nanos::from_secs(5);

    /// The config of a service that names none: one slot at a time.
    pub const ABSENT: Self = Self {
        parallelism: 1,
        delay: Nanos(0),
        failure_action: FailureAction::Pause,
        monitor: None,
        max_failure_ratio: 0.0,
        order: UpdateOrder::StopFirst,
    };
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureAction {
    #[default]
    #[serde(alias = "")]
    Pause,
    Continue,
    Rollback,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateOrder {
    #[default]
    #[serde(alias = "")]
    StopFirst,
    StartFirst,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EndpointSpec {
    pub mode: EndpointMode,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortConfig>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointMode {
    #[default]
    #[serde(alias = "")]
    Vip,
    Dnsrr,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortConfig {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub protocol: Protocol,
    pub target_port: u16,
    /// Zero: the node picks one.
    #[serde(skip_serializing_if = "is_zero")]
    pub published_port: u16,
    pub publish_mode: PublishMode,
    /// The host's address that the port is opened on; all of them if absent. Not in Docker's API.
    #[serde(rename = "HostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<std::net::Ipv4Addr>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(value: &u16) -> bool {
    *value == 0
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    #[serde(alias = "")]
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    #[default]
    #[serde(alias = "")]
    Ingress,
    Host,
}

/// How far the last update came.
#[derive(Clone, Debug, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct UpdateStatus {
    pub state: UpdateState,
    pub started_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Timestamp>,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateState {
    Updating,
    Paused,
    Completed,
    RollbackStarted,
    RollbackPaused,
    RollbackCompleted,
}

impl UpdateState {
    /// The word of the Engine API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Updating => "updating",
            Self::Paused => "paused",
            Self::Completed => "completed",
            Self::RollbackStarted => "rollback_started",
            Self::RollbackPaused => "rollback_paused",
            Self::RollbackCompleted => "rollback_completed",
        }
    }

    /// Whether the updater has something to do.
    #[must_use]
    pub const fn is_in_progress(self) -> bool {
        match self {
            Self::Updating | Self::RollbackStarted => true,
            Self::Paused | Self::Completed | Self::RollbackPaused | Self::RollbackCompleted => false,
        }
    }
}

/// A service as it is stored.
#[derive(Clone, Debug, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Service {
    #[serde(rename = "ID")]
    pub id: ServiceId,
    #[serde(flatten)]
    pub meta: Meta,
    pub spec: ServiceSpec,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_spec: Option<ServiceSpec>,
    pub endpoint: Endpoint,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_status: Option<UpdateStatus>,
    /// Of a job alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_status: Option<JobStatus>,
    /// Set by a removal; the service is gone from every list, and its tasks are on their way out.
    #[serde(skip)]
    pub removed: bool,
}

/// Where a service is reached.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Endpoint {
    pub spec: EndpointSpec,
    /// As in the spec, with the numbers that were picked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortConfig>,
    /// One address in each of its networks, unless the endpoint mode is dnsrr.
    #[serde(rename = "VirtualIPs", skip_serializing_if = "Vec::is_empty")]
    pub virtual_ips: Vec<VirtualIp>,
}

/// A service's address in one network, which stands for all of its tasks.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct VirtualIp {
    pub network: NetworkId,
    pub address: std::net::Ipv4Addr,
    pub prefix_len: u8,
}

impl Serialize for VirtualIp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Json {
            #[serde(rename = "NetworkID")]
            network: NetworkId,
            #[serde(rename = "Addr")]
            addr: String,
        }
        Json { network: self.network, addr: format!("{}/{}", self.address, self.prefix_len) }.serialize(serializer)
    }
}

/// Why a service's spec is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ServiceSpecError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("a service needs an image: name one, such as nginx:1.27")]
    NoImage,
    #[error("{0} replicas are too many: at most {REPLICAS_MAX} are allowed for one service")]
    Replicas(u64),
    #[error(transparent)]
    Constraint(#[from] ParseConstraintError),
    #[error("{field} of {value} is not possible: {rule}")]
    OutOfRange { field: &'static str, value: String, rule: &'static str },
    #[error("{0}")]
    Invalid(String),
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
}

impl ServiceSpec {
    /// What is taken, and yet is most likely a mistake.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let preferences = self.task_template.placement.preferences.iter();
        let descriptors = preferences.map(|preference| preference.spread.spread_descriptor.as_str());
        let is_label = |descriptor: &&str| {
            ["node.labels.", "engine.labels."]
                .iter()
                .any(|prefix| descriptor.strip_prefix(prefix).is_some_and(|label| !label.is_empty()))
        };
        let warning = |descriptor: &str| {
            format!("spread over {descriptor:?} changes nothing: name a label as node.labels.KEY or engine.labels.KEY")
        };
        descriptors.filter(|descriptor| !is_label(descriptor)).map(warning).collect()
    }

    /// Checks all that can be known without the swarm's other objects.
    pub fn validate(&self) -> Result<(), ServiceSpecError> {
        check_service_name(&self.name)?;
        let container = &self.task_template.container;
        if container.image.trim().is_empty() {
            return Err(ServiceSpecError::NoImage);
        }
        self.mode.validate()?;
        if self.mode.is_job() && (self.update_config.is_some() || self.rollback_config.is_some()) {
            return Err(ServiceSpecError::Invalid(
                "update and rollback configuration is not supported for jobs: an update begins the job anew".into(),
            ));
        }
        for text in &self.task_template.placement.constraints {
            text.parse::<Constraint>()?;
        }
        self.validate_resources()?;
        self.validate_restart()?;
        for config in [&self.update_config, &self.rollback_config].into_iter().flatten() {
            check_update_config(config)?;
        }
        check_files(container)?;
        check_mounts(container)?;
        self.validate_ports()
    }

    fn validate_resources(&self) -> Result<(), ServiceSpecError> {
        let resources = &self.task_template.resources;
        if let Some(limits) = &resources.limits {
            check_cpu("limit-cpu", limits.nano_cpus.0)?;
            check_memory("limit-memory", limits.memory_bytes.0)?;
            if limits.pids < 0 {
                return Err(out_of_range("limit-pids", limits.pids, "a positive number, or 0 for no limit"));
            }
        }
        let Resources { nano_cpus, memory_bytes, generic } = resources.reserved();
        generic_resource::check_reserved(&generic).map_err(|error| ServiceSpecError::Invalid(error.to_string()))?;
        check_cpu("reserve-cpu", nano_cpus.0)?;
        check_memory("reserve-memory", memory_bytes.0)
    }

    fn validate_restart(&self) -> Result<(), ServiceSpecError> {
        let Some(policy) = &self.task_template.restart_policy else { return Ok(()) };
        for (field, value) in [("restart-delay", policy.delay), ("restart-window", policy.window)] {
            if value.is_some_and(|nanos| nanos.0 < 0) {
                return Err(out_of_range(field, value.unwrap_or_default().0, "a length of time is not negative"));
            }
        }
        if self.task_template.container.stop_grace_period.is_some_and(|grace| grace.0 < 0) {
            return Err(out_of_range("stop-grace-period", "less than 0", "a length of time is not negative"));
        }
        Ok(())
    }

    fn validate_ports(&self) -> Result<(), ServiceSpecError> {
        let Some(endpoint) = &self.endpoint_spec else { return Ok(()) };
        let mut seen = std::collections::BTreeSet::new();
        for port in &endpoint.ports {
            if port.target_port == 0 {
                return Err(out_of_range("target port", 0, "a port from 1 to 65535"));
            }
            match (port.publish_mode, endpoint.mode) {
                (PublishMode::Ingress, EndpointMode::Dnsrr) => {
                    return Err(ServiceSpecError::Invalid(
                        "endpoint mode dnsrr has no virtual address to publish through: publish the port with \
                         mode=host, or use endpoint mode vip"
                            .into(),
                    ));
                }
                (PublishMode::Host, _) | (PublishMode::Ingress, EndpointMode::Vip) => {}
            }
            if port.published_port != 0 && !seen.insert((port.protocol, port.published_port)) {
                return Err(ServiceSpecError::Invalid(format!(
                    "port {}/{} is published twice: give each target its own port",
                    port.published_port,
                    port.protocol.as_str()
                )));
            }
        }
        Ok(())
    }

    /// The ports that each task's node publishes.
    pub fn host_ports(&self) -> impl Iterator<Item = &PortConfig> {
        self.ports().filter(|port| port.publish_mode == PublishMode::Host)
    }

    /// The ports that every node publishes.
    pub fn ingress_ports(&self) -> impl Iterator<Item = &PortConfig> {
        self.ports().filter(|port| port.publish_mode == PublishMode::Ingress)
    }

    fn ports(&self) -> impl Iterator<Item = &PortConfig> {
        self.endpoint_spec.iter().flat_map(|endpoint| &endpoint.ports)
    }

    #[must_use]
    pub fn endpoint_mode(&self) -> EndpointMode {
        self.endpoint_spec.as_ref().map(|endpoint| endpoint.mode).unwrap_or_default()
    }
}

fn out_of_range(field: &'static str, value: impl ToString, rule: &'static str) -> ServiceSpecError {
    ServiceSpecError::OutOfRange { field, value: value.to_string(), rule }
}

fn check_cpu(field: &'static str, nanos: i64) -> Result<(), ServiceSpecError> {
    if nanos != 0 && nanos < NANO_CPUS_MIN {
        return Err(out_of_range(field, format!("{nanos} billionths of a CPU"), "at least 0.001 CPU is needed"));
    }
    Ok(())
}

fn check_memory(field: &'static str, bytes: i64) -> Result<(), ServiceSpecError> {
    if bytes != 0 && bytes < MEMORY_BYTES_MIN {
        return Err(out_of_range(field, format!("{bytes} bytes"), "at least 4 MiB are needed"));
    }
    Ok(())
}

fn check_update_config(config: &UpdateConfig) -> Result<(), ServiceSpecError> {
    if !(0.0..=1.0).contains(&config.max_failure_ratio) {
        return Err(out_of_range("max-failure-ratio", config.max_failure_ratio, "a share from 0 to 1"));
    }
    if config.delay.0 < 0 || config.monitor.is_some_and(|monitor| monitor.0 < 0) {
        return Err(out_of_range("delay or monitor", "less than 0", "a length of time is not negative"));
    }
    Ok(())
}

fn check_files(container: &crate::container::ContainerSpec) -> Result<(), ServiceSpecError> {
    let files = container
        .secrets
        .iter()
        .map(|r| ("secret", &r.secret_name, &r.file))
        .chain(container.configs.iter().map(|r| ("config", &r.config_name, &r.file)));
    let mut targets = std::collections::BTreeSet::new();
    for (kind, name, file) in files {
        if file.name.is_empty() || file.name.split('/').any(|part| part == "..") {
            return Err(ServiceSpecError::Invalid(format!(
                "{kind} {name} cannot appear as {:?}: a file name or an absolute path without .. is needed",
                file.name
            )));
        }
        if file.uid.parse::<u32>().is_err() || file.gid.parse::<u32>().is_err() {
            return Err(ServiceSpecError::Invalid(format!(
                "{kind} {name}: uid {:?} and gid {:?} must be numbers",
                file.uid, file.gid
            )));
        }
        if !targets.insert((kind, &file.name)) {
            return Err(ServiceSpecError::Invalid(format!(
                "two {kind}s have the target {:?}: give each its own",
                file.name
            )));
        }
    }
    Ok(())
}

fn check_mounts(container: &crate::container::ContainerSpec) -> Result<(), ServiceSpecError> {
    use crate::container::MountKind;
    let mut targets = std::collections::BTreeSet::new();
    for mount in &container.mounts {
        if !mount.target.starts_with('/') || mount.target.split('/').any(|part| part == "..") {
            return Err(ServiceSpecError::Invalid(format!(
                "mount target {:?} must be an absolute path without ..",
                mount.target
            )));
        }
        if !targets.insert(&mount.target) {
            return Err(ServiceSpecError::Invalid(format!("two mounts have the target {:?}", mount.target)));
        }
        match mount.kind {
            MountKind::Bind if !mount.source.starts_with('/') => {
                return Err(ServiceSpecError::Invalid(format!(
                    "bind source {:?} must be an absolute path of the host",
                    mount.source
                )));
            }
            MountKind::Tmpfs if !mount.source.is_empty() => {
                return Err(ServiceSpecError::Invalid(format!("the tmpfs at {} takes no source", mount.target)));
            }
            MountKind::Image => {
                return Err(ServiceSpecError::Unsupported("a mount of type image in a service"));
            }
            MountKind::Cluster if mount.source.is_empty() => {
                return Err(ServiceSpecError::Invalid(format!(
                    "the cluster volume at {} has no source: name a volume, or a group as group:GROUP",
                    mount.target
                )));
            }
            MountKind::Bind | MountKind::Volume | MountKind::Tmpfs | MountKind::Cluster => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, want: &str) {
        let spec: ServiceSpec = serde_json::from_str(json).unwrap();
        let got = spec.validate().map_or_else(|error| error.to_string(), |()| "ok".to_owned());
        assert!(got.contains(want), "{got:?} should say {want:?}");
    }

    #[test]
    fn specs_are_checked_at_the_edge() {
        let with =
            |rest: &str| format!(r#"{{"Name":"web","TaskTemplate":{{"ContainerSpec":{{"Image":"nginx"}}{rest}}}}}"#);
        check(&with(""), "ok");
        check(r#"{"Name":"web"}"#, "needs an image");
        check(r#"{"TaskTemplate":{"ContainerSpec":{"Image":"a"}}}"#, "needs a name");
        check(&with(r#","Placement":{"Constraints":["zone=a"]}"#), "zone=a");
        check(&with(r#","Resources":{"Reservations":{"NanoCPUs":5}}"#), "0.001 CPU");
        check(&with(r#","Resources":{"Limits":{"MemoryBytes":4096}}"#), "4 MiB");
        check(&with(r#","RestartPolicy":{"Delay":-1}"#), "not negative");
        check(
            r#"{"Name":"w","TaskTemplate":{"ContainerSpec":{"Image":"a"}},"EndpointSpec":{"Mode":"dnsrr","Ports":[{"TargetPort":80}]}}"#,
            "dnsrr",
        );
        check(
            r#"{"Name":"w","TaskTemplate":{"ContainerSpec":{"Image":"a"}},"Mode":{"Replicated":{"Replicas":10000000}}}"#,
            "too many",
        );
    }
}
