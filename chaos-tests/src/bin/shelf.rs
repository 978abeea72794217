//! A storage driver for the tests, as strict as the interface allows: volumes are directories on a shelf that all hosts
//! share, or disks in files there, and a host has one only while the driver's controller lets it.
//!
//! `shelf SOCKET SHELF NODE [ZONE]`; a volume is `SHELF/NAME`, what hosts have it `SHELF/NAME.nodes/NODE`, and a disk
//! `SHELF/NAME/disk`, shown by a loop device. Calls are written to `SHELF/calls`.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use skep_csi::interface as csi;
use skep_csi::interface::controller_server::{Controller, ControllerServer};
use skep_csi::interface::identity_server::{Identity, IdentityServer};
use skep_csi::interface::node_server::{Node, NodeServer};
use skep_csi::interface::volume_capability::{AccessType, access_mode::Mode};
use skep_csi::interface::{controller_service_capability, node_service_capability, plugin_capability};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// What a volume with the parameter `locked` wants under the key `key`.
const PASSWORD: &str = "sesame";
const DISK: &str = "disk";
const DISK_LEN: u64 = 8 << 20;

#[derive(Clone)]
struct Shelf(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    node: String,
    zone: Option<String>,
}

type Answer<T> = Result<Response<T>, Status>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, dir, node, zone @ ..] = &args[..] else { return Err("shelf SOCKET SHELF NODE [ZONE]".into()) };
    let zone = zone.first().cloned();
    let shelf = Shelf(Arc::new(Inner { dir: dir.into(), node: node.clone(), zone }));
    fs::create_dir_all(&shelf.0.dir)?;
    let socket = Path::new(socket);
    fs::create_dir_all(socket.parent().ok_or("a socket has a directory")?)?;
    drop(fs::remove_file(socket));
    let connections = UnixListenerStream::new(UnixListener::bind(socket)?);
    let server = Server::builder()
        .add_service(IdentityServer::new(shelf.clone()))
        .add_service(ControllerServer::new(shelf.clone()))
        .add_service(NodeServer::new(shelf));
    server.serve_with_incoming(connections).await?;
    Ok(())
}

impl Shelf {
    fn volume(&self, id: &str) -> Result<PathBuf, Status> {
        let dir = self.0.dir.join(id);
        if id.is_empty() || !dir.is_dir() {
            return Err(Status::not_found(format!("there is no volume {id:?} on the shelf")));
        }
        Ok(dir)
    }

    /// Marks of the nodes that have the volume.
    fn marks(&self, id: &str) -> PathBuf {
        self.0.dir.join(format!("{id}.nodes"))
    }

    fn holders(&self, id: &str) -> Vec<String> {
        let entries = fs::read_dir(self.marks(id)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    fn note(&self, call: &str, id: &str) -> Result<(), Status> {
        let mut calls = fs::OpenOptions::new().create(true).append(true).open(self.0.dir.join("calls"))?;
        Ok(writeln!(calls, "{} {call} {id}", self.0.node)?)
    }
}

/// How a volume may be used, and whether as a block device.
fn check(capability: Option<&csi::VolumeCapability>) -> Result<(Mode, bool), Status> {
    let wanted = capability.ok_or_else(|| Status::invalid_argument("no volume capability"))?;
    let is_block = match &wanted.access_type {
        Some(AccessType::Mount(_)) => false,
        Some(AccessType::Block(_)) => true,
        None => return Err(Status::invalid_argument("no access type")),
    };
    let mode = wanted.access_mode.as_ref().map_or(Mode::Unknown, csi::volume_capability::AccessMode::mode);
    if mode == Mode::Unknown { Err(Status::invalid_argument("no access mode")) } else { Ok((mode, is_block)) }
}

/// The loop devices that show a disk, each as losetup has it.
fn loops(disk: &Path) -> Result<Vec<String>, Status> {
    let told = losetup(&["--noheadings", "--output", "NAME", "--associated", &disk.display().to_string()])?;
    Ok(told.lines().map(|line| line.trim().to_owned()).collect())
}

fn losetup(args: &[&str]) -> Result<String, Status> {
    let ran = std::process::Command::new("losetup").args(args).output()?;
    if !ran.status.success() {
        return Err(Status::internal(format!("losetup {args:?}: {}", String::from_utf8_lossy(&ran.stderr))));
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

fn check_secret(context: &HashMap<String, String>, secrets: &HashMap<String, String>) -> Result<(), Status> {
    let is_locked = context.contains_key("locked");
    if is_locked && secrets.get("key").map(String::as_str) != Some(PASSWORD) {
        return Err(Status::unauthenticated("the shelf is locked: the key is wrong or missing"));
    }
    Ok(())
}

fn is_mounted(path: &str) -> Result<bool, Status> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().any(|line| line.split(' ').nth(4) == Some(path)))
}

fn bind(from: &str, to: &str, more: MsFlags) -> Result<(), Status> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | more, None::<&str>)
        .map_err(|error| Status::internal(format!("mount {from} on {to}: {error}")))
}

fn unbind(path: &str) -> Result<(), Status> {
    if is_mounted(path)? {
        umount2(path, MntFlags::empty()).map_err(|error| Status::internal(format!("umount {path}: {error}")))?;
    }
    Ok(())
}

#[tonic::async_trait]
impl Identity for Shelf {
    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Answer<csi::GetPluginCapabilitiesResponse> {
        let service = plugin_capability::Service { r#type: plugin_capability::service::Type::ControllerService.into() };
        let capability = csi::PluginCapability { r#type: Some(plugin_capability::Type::Service(service)) };
        Ok(Response::new(csi::GetPluginCapabilitiesResponse { capabilities: vec![capability] }))
    }
}

#[tonic::async_trait]
impl Controller for Shelf {
    async fn create_volume(&self, request: Request<csi::CreateVolumeRequest>) -> Answer<csi::CreateVolumeResponse> {
        let wanted = request.into_inner();
        self.note("CreateVolume", &wanted.name)?;
        let (_, is_block) = check(wanted.volume_capabilities.first())?;
        check_secret(&wanted.parameters, &wanted.secrets)?;
        if wanted.parameters.contains_key("fail") {
            return Err(Status::resource_exhausted("the shelf is full"));
        }
        fs::create_dir_all(self.0.dir.join(&wanted.name))?;
        fs::create_dir_all(self.marks(&wanted.name))?;
        if is_block {
            fs::File::create(self.0.dir.join(&wanted.name).join(DISK))?.set_len(DISK_LEN)?;
        }
        let required = wanted.accessibility_requirements.map(|wanted| wanted.requisite).unwrap_or_default();
        let volume = csi::Volume {
            capacity_bytes: wanted.capacity_range.map_or(0, |range| range.required_bytes),
            volume_id: wanted.name,
            volume_context: wanted.parameters,
            accessible_topology: required,
        };
        Ok(Response::new(csi::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(&self, request: Request<csi::DeleteVolumeRequest>) -> Answer<csi::DeleteVolumeResponse> {
        let id = request.into_inner().volume_id;
        self.note("DeleteVolume", &id)?;
        let holders = self.holders(&id);
        if !holders.is_empty() {
            return Err(Status::failed_precondition(format!("{} have it", holders.join(", "))));
        }
        for dir in [self.0.dir.join(&id), self.marks(&id)] {
            if dir.exists() {
                fs::remove_dir_all(dir)?;
            }
        }
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Answer<csi::ControllerPublishVolumeResponse> {
        let wanted = request.into_inner();
        self.note(&format!("ControllerPublishVolume:{}", wanted.node_id), &wanted.volume_id)?;
        let dir = self.volume(&wanted.volume_id)?;
        let (mode, _) = check(wanted.volume_capability.as_ref())?;
        check_secret(&wanted.volume_context, &wanted.secrets)?;
        let mut others = self.holders(&wanted.volume_id);
        others.retain(|holder| *holder != wanted.node_id);
        if matches!(mode, Mode::SingleNodeWriter | Mode::SingleNodeReaderOnly) && !others.is_empty() {
            return Err(Status::failed_precondition(format!("{} has it", others.join(", "))));
        }
        fs::write(self.marks(&wanted.volume_id).join(&wanted.node_id), "")?;
        let publish_context = HashMap::from([("path".to_owned(), dir.display().to_string())]);
        Ok(Response::new(csi::ControllerPublishVolumeResponse { publish_context }))
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Answer<csi::ControllerUnpublishVolumeResponse> {
        let wanted = request.into_inner();
        self.note(&format!("ControllerUnpublishVolume:{}", wanted.node_id), &wanted.volume_id)?;
        for holder in self.holders(&wanted.volume_id) {
            if wanted.node_id.is_empty() || wanted.node_id == holder {
                fs::remove_file(self.marks(&wanted.volume_id).join(holder))?;
            }
        }
        Ok(Response::new(csi::ControllerUnpublishVolumeResponse {}))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Answer<csi::ControllerGetCapabilitiesResponse> {
        use controller_service_capability::{Rpc, Type, rpc};
        let of =
            |kind: rpc::Type| csi::ControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })) };
        let capabilities = vec![of(rpc::Type::CreateDeleteVolume), of(rpc::Type::PublishUnpublishVolume)];
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities }))
    }
}

#[tonic::async_trait]
impl Node for Shelf {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Answer<csi::NodeStageVolumeResponse> {
        let wanted = request.into_inner();
        self.note("NodeStageVolume", &wanted.volume_id)?;
        let disk = self.volume(&wanted.volume_id)?.join(DISK);
        let (_, is_block) = check(wanted.volume_capability.as_ref())?;
        check_secret(&wanted.volume_context, &wanted.secrets)?;
        if !self.holders(&wanted.volume_id).contains(&self.0.node) {
            return Err(Status::failed_precondition("this node was not given it"));
        }
        let path = wanted.publish_context.get("path");
        let path = path.ok_or_else(|| Status::invalid_argument("no path in the publish context"))?;
        if is_block && loops(&disk)?.is_empty() {
            losetup(&["--find", &disk.display().to_string()])?;
        } else if !is_block && !is_mounted(&wanted.staging_target_path)? {
            bind(path, &wanted.staging_target_path, MsFlags::empty())?;
        }
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Answer<csi::NodeUnstageVolumeResponse> {
        let wanted = request.into_inner();
        self.note("NodeUnstageVolume", &wanted.volume_id)?;
        unbind(&wanted.staging_target_path)?;
        for device in loops(&self.volume(&wanted.volume_id)?.join(DISK))? {
            losetup(&["--detach", &device])?;
        }
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        let wanted = request.into_inner();
        self.note("NodePublishVolume", &wanted.volume_id)?;
        let (_, is_block) = check(wanted.volume_capability.as_ref())?;
        if is_block {
            let shown = loops(&self.volume(&wanted.volume_id)?.join(DISK))?;
            let device = shown.first().ok_or_else(|| Status::failed_precondition("it was not staged"))?;
            if !is_mounted(&wanted.target_path)? {
                fs::File::create(&wanted.target_path)?;
                bind(device, &wanted.target_path, MsFlags::empty())?;
            }
            return Ok(Response::new(csi::NodePublishVolumeResponse {}));
        }
        if !is_mounted(&wanted.staging_target_path)? {
            return Err(Status::failed_precondition("it was not staged"));
        }
        if !is_mounted(&wanted.target_path)? {
            fs::create_dir_all(&wanted.target_path)?;
            bind(&wanted.staging_target_path, &wanted.target_path, MsFlags::empty())?;
            if wanted.readonly {
                bind("none", &wanted.target_path, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
            }
        }
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let wanted = request.into_inner();
        self.note("NodeUnpublishVolume", &wanted.volume_id)?;
        unbind(&wanted.target_path)?;
        drop(fs::remove_dir(&wanted.target_path));
        drop(fs::remove_file(&wanted.target_path));
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Answer<csi::NodeGetCapabilitiesResponse> {
        use node_service_capability::{Rpc, Type, rpc};
        let stages = Type::Rpc(Rpc { r#type: rpc::Type::StageUnstageVolume.into() });
        let capabilities = vec![csi::NodeServiceCapability { r#type: Some(stages) }];
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<csi::NodeGetInfoRequest>) -> Answer<csi::NodeGetInfoResponse> {
        let topology = |zone: &String| csi::Topology { segments: HashMap::from([("zone".to_owned(), zone.clone())]) };
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.0.node.clone(),
            max_volumes_per_node: 0,
            accessible_topology: self.0.zone.as_ref().map(topology),
        }))
    }
}
