//! One driver: its calls, in the words of the rest of Skep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use skep_api::volume::{
    AccessMode, NodeCsiInfo, Scope, Sharing, Topology, TopologyRequirement, VolumeAssignment, VolumeInfo,
};
use skep_api::{SecretBytes, Volume};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use crate::CsiError;
use crate::interface as csi;
use crate::interface::controller_client::ControllerClient;
use crate::interface::controller_service_capability as controller;
use crate::interface::identity_client::IdentityClient;
use crate::interface::node_client::NodeClient;
use crate::interface::node_service_capability as node;
use crate::interface::plugin_capability as plugin;
use crate::interface::volume_capability::{AccessType, BlockVolume, MountVolume, access_mode::Mode};

/// How long one call may take: making a volume of a storage system takes its time.
const CALL_LIMIT: Duration = Duration::from_secs(120);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The secrets that a call takes along, by the driver's keys.
pub type Secrets = BTreeMap<String, SecretBytes>;

/// A connection to a driver.
#[derive(Clone, Debug)]
pub struct Driver {
    name: String,
    channel: Channel,
}

/// What a driver's controller does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// Makes and deletes volumes; otherwise those that are named are taken to be there.
    pub creates: bool,
    /// Lets nodes have volumes, and takes them away.
    pub publishes: bool,
}

impl Driver {
    pub(crate) async fn connect(name: &str, path: &Path) -> Result<Self, tonic::transport::Error> {
        let path: PathBuf = path.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is of no use to a socket, and has to be one.
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT_LIMIT);
        let channel = endpoint.connect_with_connector(connector).await?;
        Ok(Self { name: name.to_owned(), channel })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CsiError> {
        let name = self.name.clone();
        match tokio::time::timeout(CALL_LIMIT, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => {
                Err(CsiError::Refused { name, call, message: status.message().to_owned(), code: status.code() })
            }
            Err(_) => Err(CsiError::TimedOut { name, call, seconds: CALL_LIMIT.as_secs() }),
        }
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// What its controller does; nothing if it has none.
    ///
    /// # Errors
    ///
    /// The driver fails, as with every call below.
    pub async fn controls(&self) -> Result<Controls, CsiError> {
        let mut identity = IdentityClient::new(self.channel.clone());
        let asked = identity.get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {});
        let plugin = self.call("GetPluginCapabilities", asked).await?.capabilities;
        let has_controller = plugin.into_iter().any(|capability| match capability.r#type {
            Some(plugin::Type::Service(service)) => service.r#type() == plugin::service::Type::ControllerService,
            None => false,
        });
        if !has_controller {
            return Ok(Controls::default());
        }
        let mut controller = self.controller();
        let asked = controller.controller_get_capabilities(csi::ControllerGetCapabilitiesRequest {});
        let mut controls = Controls::default();
        for capability in self.call("ControllerGetCapabilities", asked).await?.capabilities {
            let Some(controller::Type::Rpc(rpc)) = capability.r#type else { continue };
            match rpc.r#type() {
                controller::rpc::Type::CreateDeleteVolume => controls.creates = true,
                controller::rpc::Type::PublishUnpublishVolume => controls.publishes = true,
                controller::rpc::Type::Unknown => {}
            }
        }
        Ok(controls)
    }

    /// Makes a volume, or finds that it is made: by its id in the swarm, which no other one ever had.
    pub async fn create(&self, volume: &Volume, secrets: Secrets) -> Result<VolumeInfo, CsiError> {
        let spec = &volume.spec;
        let parameters = spec.driver.options.clone().into_iter().collect();
        if !self.controls().await?.creates {
            let volume_context = spec.driver.options.clone();
            return Ok(VolumeInfo { volume_id: spec.name.clone(), volume_context, ..VolumeInfo::default() });
        }
        let range = spec
            .cluster
            .capacity_range
            .map(|range| csi::CapacityRange { required_bytes: range.required_bytes, limit_bytes: range.limit_bytes });
        let request = csi::CreateVolumeRequest {
            name: format!("skep-{}", volume.id),
            capacity_range: range,
            volume_capabilities: vec![capability(&spec.cluster.access_mode)],
            parameters,
            secrets: exposed(secrets),
            accessibility_requirements: spec.cluster.accessibility_requirements.clone().map(requirement),
        };
        let call = "CreateVolume";
        let made = self.call(call, self.controller().create_volume(request)).await?.volume;
        let incomplete = |missing| CsiError::Incomplete { name: self.name.clone(), call, missing };
        let made = made.ok_or_else(|| incomplete("a volume"))?;
        if made.volume_id.is_empty() {
            return Err(incomplete("the volume's id"));
        }
        Ok(VolumeInfo {
            capacity_bytes: made.capacity_bytes,
            volume_context: made.volume_context.into_iter().collect(),
            volume_id: made.volume_id,
            accessible_topology: made.accessible_topology.into_iter().map(place).collect(),
        })
    }

    /// Deletes a volume with all that is on it.
    pub async fn delete(&self, info: &VolumeInfo, secrets: Secrets) -> Result<(), CsiError> {
        if !self.controls().await?.creates {
            return Ok(());
        }
        let request = csi::DeleteVolumeRequest { volume_id: info.volume_id.clone(), secrets: exposed(secrets) };
        self.call("DeleteVolume", self.controller().delete_volume(request)).await.map(drop)
    }

    /// Lets a node have a volume. What the node's side of the driver is to be told.
    pub async fn controller_publish(
        &self,
        volume: &Volume,
        info: &VolumeInfo,
        node_id: &str,
        secrets: Secrets,
    ) -> Result<BTreeMap<String, String>, CsiError> {
        if !self.controls().await?.publishes {
            return Ok(BTreeMap::new());
        }
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: info.volume_id.clone(),
            node_id: node_id.to_owned(),
            volume_capability: Some(capability(&volume.spec.cluster.access_mode)),
            // Drivers that can take it say so, and none has to: the node's side is told.
            readonly: false,
            secrets: exposed(secrets),
            volume_context: info.volume_context.clone().into_iter().collect(),
        };
        let published =
            self.call("ControllerPublishVolume", self.controller().controller_publish_volume(request)).await?;
        Ok(published.publish_context.into_iter().collect())
    }

    /// Takes a volume from a node.
    pub async fn controller_unpublish(
        &self,
        info: &VolumeInfo,
        node_id: &str,
        secrets: Secrets,
    ) -> Result<(), CsiError> {
        if !self.controls().await?.publishes {
            return Ok(());
        }
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: info.volume_id.clone(),
            node_id: node_id.to_owned(),
            secrets: exposed(secrets),
        };
        let mut controller = self.controller();
        let unpublished = controller.controller_unpublish_volume(request);
        self.call("ControllerUnpublishVolume", unpublished).await.map(drop)
    }

    /// What its node's side says of itself.
    pub async fn node_info(&self) -> Result<NodeCsiInfo, CsiError> {
        let info = self.call("NodeGetInfo", self.node().node_get_info(csi::NodeGetInfoRequest {})).await?;
        Ok(NodeCsiInfo {
            plugin_name: self.name.clone(),
            node_id: info.node_id,
            max_volumes_per_node: info.max_volumes_per_node.max(0),
            accessible_topology: info.accessible_topology.map(place),
        })
    }

    /// Whether volumes come to a node in two steps, the first of which is for all that use it there.
    async fn stages(&self) -> Result<bool, CsiError> {
        let asked = csi::NodeGetCapabilitiesRequest {};
        let capabilities = self.call("NodeGetCapabilities", self.node().node_get_capabilities(asked)).await?;
        Ok(capabilities.capabilities.into_iter().any(|capability| match capability.r#type {
            Some(node::Type::Rpc(rpc)) => rpc.r#type() == node::rpc::Type::StageUnstageVolume,
            None => false,
        }))
    }

    /// Brings a volume to this node, at `target`, whose directory is there; `staging` is a directory for the first of two
    /// steps.
    pub async fn node_publish(&self, volume: &VolumeAssignment, staging: &Path, target: &Path) -> Result<(), CsiError> {
        let stages = self.stages().await?;
        let staging = text(staging);
        let capability = capability(&volume.access_mode);
        let context: std::collections::HashMap<_, _> = volume.volume_context.clone().into_iter().collect();
        let publish_context: std::collections::HashMap<_, _> = volume.publish_context.clone().into_iter().collect();
        if stages {
            let request = csi::NodeStageVolumeRequest {
                volume_id: volume.volume_id.clone(),
                publish_context: publish_context.clone(),
                staging_target_path: staging.clone(),
                volume_capability: Some(capability.clone()),
                secrets: exposed(volume.secrets.clone()),
                volume_context: context.clone(),
            };
            self.call("NodeStageVolume", self.node().node_stage_volume(request)).await?;
        }
        let request = csi::NodePublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            publish_context,
            staging_target_path: if stages { staging } else { String::new() },
            target_path: text(target),
            volume_capability: Some(capability),
            readonly: volume.access_mode.sharing == Sharing::ReadOnly,
            secrets: exposed(volume.secrets.clone()),
            volume_context: context,
        };
        self.call("NodePublishVolume", self.node().node_publish_volume(request)).await.map(drop)
    }

    /// Takes it away again.
    pub async fn node_unpublish(&self, volume_id: &str, staging: &Path, target: &Path) -> Result<(), CsiError> {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: volume_id.to_owned(), target_path: text(target) };
        self.call("NodeUnpublishVolume", self.node().node_unpublish_volume(request)).await?;
        if self.stages().await? {
            let request =
                csi::NodeUnstageVolumeRequest { volume_id: volume_id.to_owned(), staging_target_path: text(staging) };
            self.call("NodeUnstageVolume", self.node().node_unstage_volume(request)).await?;
        }
        Ok(())
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn exposed(secrets: Secrets) -> std::collections::HashMap<String, String> {
    let exposed = |secret: SecretBytes| String::from_utf8_lossy(secret.expose()).into_owned();
    secrets.into_iter().map(|(key, secret)| (key, exposed(secret))).collect()
}

fn place(topology: csi::Topology) -> Topology {
    Topology { segments: topology.segments.into_iter().collect() }
}

fn requirement(wanted: TopologyRequirement) -> csi::TopologyRequirement {
    let places = |places: Vec<Topology>| -> Vec<csi::Topology> {
        places.into_iter().map(|place| csi::Topology { segments: place.segments.into_iter().collect() }).collect()
    };
    csi::TopologyRequirement { requisite: places(wanted.requisite), preferred: places(wanted.preferred) }
}

fn capability(access: &AccessMode) -> csi::VolumeCapability {
    let mode = match (access.scope, access.sharing) {
        (Scope::Single, Sharing::ReadOnly) => Mode::SingleNodeReaderOnly,
        (Scope::Single, Sharing::None | Sharing::OneWriter | Sharing::All) => Mode::SingleNodeWriter,
        (Scope::Multi, Sharing::ReadOnly) => Mode::MultiNodeReaderOnly,
        (Scope::Multi, Sharing::None | Sharing::OneWriter) => Mode::MultiNodeSingleWriter,
        (Scope::Multi, Sharing::All) => Mode::MultiNodeMultiWriter,
    };
    let access_type = match &access.mount_volume {
        Some(mount) => {
            AccessType::Mount(MountVolume { fs_type: mount.fs_type.clone(), mount_flags: mount.mount_flags.clone() })
        }
        None => AccessType::Block(BlockVolume {}),
    };
    csi::VolumeCapability {
        access_mode: Some(csi::volume_capability::AccessMode { mode: mode.into() }),
        access_type: Some(access_type),
    }
}
