//! Volumes of the swarm: kept by storage drivers that speak CSI, and shown to tasks wherever those run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::container::Driver;
use crate::id::{NodeId, SecretId, VolumeId};
use crate::name::{NameError, check_object_name};
use crate::node::Availability;
use crate::object::Meta;
use crate::secret_bytes::SecretBytes;

/// What a mount's source begins with if any volume of a group will do.
pub const GROUP_PREFIX: &str = "group:";

/// What a volume should be.
#[derive(Clone, Debug, Default, PartialEq, Extensible)]
pub struct VolumeSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// Its options go to the storage driver as they are.
    pub driver: Driver,
    pub cluster: ClusterVolumeSpec,
}

/// The part of it that volumes of one host have not.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ClusterVolumeSpec {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    pub access_mode: AccessMode,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accessibility_requirements: Option<TopologyRequirement>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_range: Option<CapacityRange>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<VolumeSecret>,
    /// Whether tasks may use it.
    pub availability: Availability,
}

/// How tasks may use a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AccessMode {
    pub scope: Scope,
    pub sharing: Sharing,
    /// As a file system: one of this and the next is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount_volume: Option<MountAccess>,
    /// As a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_volume: Option<BlockAccess>,
}

/// On how many nodes a volume may be at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    #[default]
    #[serde(alias = "")]
    Single,
    Multi,
}

/// How many tasks may use a volume at a time, and what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// One alone.
    #[default]
    #[serde(alias = "")]
    None,
    /// Any, that only read.
    ReadOnly,
    /// Any, of which one writes.
    OneWriter,
    All,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MountAccess {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fs_type: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mount_flags: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
pub struct BlockAccess {}

/// Where in the world something is: segments by domain, such as `region` or `zone`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Topology {
    pub segments: BTreeMap<String, String>,
}

/// From where a volume has to be reached, and from where it had better be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TopologyRequirement {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requisite: Vec<Topology>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub preferred: Vec<Topology>,
}

/// In bytes; zero: without that bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CapacityRange {
    pub required_bytes: i64,
    pub limit_bytes: i64,
}

/// A secret of the swarm that the storage driver gets with each call, by a key of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumeSecret {
    pub key: String,
    /// Its id; its name until the manager has looked it up.
    pub secret: String,
}

/// What the storage driver said of a volume when it made it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct VolumeInfo {
    /// Zero: not known.
    #[serde(skip_serializing_if = "is_zero")]
    pub capacity_bytes: i64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub volume_context: BTreeMap<String, String>,
    /// The storage driver's own.
    #[serde(rename = "VolumeID")]
    pub volume_id: String,
    /// Empty: reached from everywhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub accessible_topology: Vec<Topology>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
const fn is_zero(bytes: &i64) -> bool {
    *bytes == 0
}

/// How far a volume is on its way to a node, or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PublishState {
    /// The storage driver's controller is to let the node have it.
    PendingPublish,
    /// The node may use it.
    Published,
    /// The node is to let go of it.
    PendingNodeUnpublish,
    /// The node has, and the controller is to take it from there.
    PendingControllerUnpublish,
}

#[derive(Clone, Debug, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct PublishStatus {
    #[serde(rename = "NodeID")]
    pub node: NodeId,
    /// What the storage driver calls the node: known also once that is no more.
    #[serde(skip)]
    pub driver_node: String,
    pub state: PublishState,
    /// What the controller has to say to the node's side of the driver.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub publish_context: BTreeMap<String, String>,
}

/// A volume as it is stored.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub struct Volume {
    pub id: VolumeId,
    pub meta: Meta,
    pub spec: VolumeSpec,
    /// None: the storage driver has not made it yet.
    pub info: Option<VolumeInfo>,
    /// One entry for each node that has to do with it.
    pub publish_status: Vec<PublishStatus>,
    /// It goes once no node has it and the storage driver has deleted it.
    pub pending_delete: bool,
    /// Why the storage driver's last call failed; empty once one has succeeded.
    pub problem: String,
}

/// What a node needs to show a volume to its tasks.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub struct VolumeAssignment {
    pub id: VolumeId,
    pub name: String,
    pub driver: String,
    /// The storage driver's own id of it.
    pub volume_id: String,
    pub access_mode: AccessMode,
    pub volume_context: BTreeMap<String, String>,
    pub publish_context: BTreeMap<String, String>,
    /// By the driver's keys.
    pub secrets: BTreeMap<String, SecretBytes>,
}

/// Which volume a task has for one of its mounts.
#[derive(Clone, Debug, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct VolumeAttachment {
    #[serde(rename = "ID")]
    pub id: VolumeId,
    /// The mount's source, which may be a group.
    pub source: String,
    pub target: String,
}

/// A storage driver on a node, as the node's side of it describes itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeCsiInfo {
    pub plugin_name: String,
    /// What the driver calls the node.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// Zero: no bound.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_volumes_per_node: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accessible_topology: Option<Topology>,
}

/// Why a volume's spec is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeSpecError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{0}")]
    Invalid(String),
}

impl VolumeSpec {
    pub fn validate(&self) -> Result<(), VolumeSpecError> {
        let invalid = |why: &str| Err(VolumeSpecError::Invalid(format!("volume {}: {why}", self.name)));
        check_object_name("volume", &self.name)?;
        if self.driver.name.is_empty() || self.driver.name == "local" {
            return invalid("a cluster volume needs a storage driver that speaks CSI: name it by --driver");
        }
        // It is also the name of the driver's socket.
        check_object_name("volume driver", &self.driver.name)?;
        let mode = &self.cluster.access_mode;
        match (&mode.mount_volume, &mode.block_volume) {
            (Some(_), None) | (None, Some(_)) => {}
            (Some(_), Some(_)) => return invalid("it is to be mounted or to be a block device, not both"),
            (None, None) => return invalid("say whether it is to be mounted or a block device (--type mount|block)"),
        }
        let range = self.cluster.capacity_range.unwrap_or_default();
        if range.required_bytes < 0 || range.limit_bytes < 0 {
            return invalid("a capacity is less than nothing");
        }
        if range.limit_bytes != 0 && range.required_bytes > range.limit_bytes {
            return invalid("the capacity that is required is more than the limit");
        }
        if self.cluster.secrets.iter().any(|secret| secret.key.is_empty() || secret.secret.is_empty()) {
            return invalid("a secret needs the storage driver's key for it and its name: KEY=NAME");
        }
        Ok(())
    }
}

impl Volume {
    /// What becomes of it on a node; none if that has nothing to do with it.
    #[must_use]
    pub fn status_on(&self, node: NodeId) -> Option<&PublishStatus> {
        self.publish_status.iter().find(|status| status.node == node)
    }

    /// Whether a mount's source means this volume: by its name, or by its group.
    #[must_use]
    pub fn is_meant_by(&self, source: &str) -> bool {
        match source.strip_prefix(GROUP_PREFIX) {
            Some(group) => self.spec.cluster.group == group,
            None => self.spec.name == source,
        }
    }

    /// Whether it can be reached from `node`, by what its storage driver says of both.
    #[must_use]
    pub fn is_reached_from(&self, node: &crate::Node) -> bool {
        let Some(driver) = node.description.csi_driver(&self.spec.driver.name) else { return false };
        let anywhere = |info: &VolumeInfo| info.accessible_topology.is_empty();
        let here = driver.accessible_topology.clone().unwrap_or_default();
        self.info.as_ref().is_some_and(|info| {
            anywhere(info) || info.accessible_topology.iter().any(|topology| topology.contains(&here))
        })
    }

    /// The ids of the secrets that its storage driver gets, by key.
    pub fn secrets(&self) -> impl Iterator<Item = (&str, SecretId)> {
        self.spec.cluster.secrets.iter().filter_map(|secret| Some((secret.key.as_str(), secret.secret.parse().ok()?)))
    }
}

impl Topology {
    /// Whether what is at `place` is within this.
    fn contains(&self, place: &Self) -> bool {
        self.segments.iter().all(|(domain, segment)| place.segments.get(domain) == Some(segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VolumeSpec {
        let access_mode = AccessMode { mount_volume: Some(MountAccess::default()), ..AccessMode::default() };
        VolumeSpec {
            name: "data".into(),
            driver: Driver::named("disks"),
            cluster: ClusterVolumeSpec { access_mode, ..ClusterVolumeSpec::default() },
            ..VolumeSpec::default()
        }
    }

    #[test]
    fn a_spec_that_cannot_be_kept_is_refused_with_the_reason() {
        assert_eq!(spec().validate(), Ok(()));
        type Change = fn(&mut VolumeSpec);
        let wrong: [(Change, &str); 7] = [
            (|spec| spec.name = "a/b".into(), "a/b"),
            (|spec| spec.driver.name = "local".into(), "speaks CSI"),
            (|spec| spec.driver.name = "../x".into(), "../x"),
            (|spec| spec.cluster.access_mode.mount_volume = None, "--type"),
            (|spec| spec.cluster.access_mode.block_volume = Some(BlockAccess {}), "not both"),
            (
                |spec| spec.cluster.capacity_range = Some(CapacityRange { required_bytes: 2, limit_bytes: 1 }),
                "more than the limit",
            ),
            (|spec| spec.cluster.secrets = vec![VolumeSecret::default()], "KEY=NAME"),
        ];
        for (change, reason) in wrong {
            let mut spec = spec();
            change(&mut spec);
            let error = spec.validate().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_volume_is_reached_from_nodes_within_its_topology() {
        let zone = |name: &str| Topology { segments: [("zone".to_owned(), name.to_owned())].into() };
        let mut node = crate::node::testing::node(1);
        let mut volume = Volume {
            id: VolumeId::from_u128(1),
            meta: Meta::default(),
            spec: spec(),
            info: Some(VolumeInfo { accessible_topology: vec![zone("a"), zone("b")], ..VolumeInfo::default() }),
            publish_status: Vec::new(),
            pending_delete: false,
            problem: String::new(),
        };
        assert!(!volume.is_reached_from(&node), "the node has no such driver");
        node.description.csi.push(NodeCsiInfo { plugin_name: "disks".into(), ..NodeCsiInfo::default() });
        assert!(!volume.is_reached_from(&node), "the node is nowhere");
        node.description.csi[0].accessible_topology = Some(zone("b"));
        assert!(volume.is_reached_from(&node));
        node.description.csi[0].accessible_topology = Some(zone("c"));
        assert!(!volume.is_reached_from(&node));
        volume.info = Some(VolumeInfo::default());
        assert!(volume.is_reached_from(&node), "reached from everywhere");
    }
}
