//! Changes to containers that are there, and what their processes do.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use libcgroups::common::{AnyCgroupManager, CgroupConfig, CgroupManager as _, ControllerOpt, create_cgroup_manager};
use libcgroups::stats::{BlkioDeviceStat, Stats};

use super::{Container, Engine, EngineError, disk_error};
use crate::container::config::{ContainerConfig, ResourceLimits, RestartPolicy};
use crate::container::spec;
use crate::container::state::ContainerState;
use crate::disk;

/// What a container uses: times in nanoseconds since its start, sizes in bytes.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    pub cpu_nanos: u64,
    pub cpu_user_nanos: u64,
    pub cpu_kernel_nanos: u64,
    pub per_cpu_nanos: Vec<u64>,
    pub throttle_periods: u64,
    pub throttled_periods: u64,
    pub throttled_nanos: u64,
    pub memory_bytes: u64,
    pub memory_max_bytes: u64,
    pub memory_failures: u64,
    /// As the kernel names them.
    pub memory_details: BTreeMap<String, u64>,
    pub pids: u64,
    pub pids_limit: u64,
    pub io_bytes: Vec<BlockCount>,
    pub io_operations: Vec<BlockCount>,
}

/// A count of one block device.
#[derive(Clone, Debug)]
pub struct BlockCount {
    pub major: u64,
    pub minor: u64,
    /// `Read`, `Write` and so on.
    pub operation: String,
    pub value: u64,
}

impl From<Stats> for Usage {
    fn from(stats: Stats) -> Self {
        let blocks = |list: Vec<BlkioDeviceStat>| {
            let count = |stat: BlkioDeviceStat| BlockCount {
                major: stat.major,
                minor: stat.minor,
                operation: stat.op_type.unwrap_or_default(),
                value: stat.value,
            };
            list.into_iter().map(count).collect()
        };
        Self {
            cpu_nanos: stats.cpu.usage.usage_total,
            cpu_user_nanos: stats.cpu.usage.usage_user,
            cpu_kernel_nanos: stats.cpu.usage.usage_kernel,
            per_cpu_nanos: stats.cpu.usage.per_core_usage_total,
            throttle_periods: stats.cpu.throttling.periods,
            throttled_periods: stats.cpu.throttling.throttled_periods,
            throttled_nanos: stats.cpu.throttling.throttled_time,
            memory_bytes: stats.memory.memory.usage,
            memory_max_bytes: stats.memory.memory.max_usage,
            memory_failures: stats.memory.memory.fail_count,
            memory_details: stats.memory.stats.into_iter().collect(),
            pids: stats.pids.current,
            pids_limit: stats.pids.limit,
            io_bytes: blocks(stats.blkio.service_bytes),
            io_operations: blocks(stats.blkio.serviced),
        }
    }
}

impl Container {
    pub(super) fn change(&self, change: impl FnOnce(&mut ContainerConfig)) -> Result<(), EngineError> {
        {
            let mut config = self.config.lock().expect("nobody panics while holding it");
            change(Arc::make_mut(&mut config));
        }
        self.save().map_err(disk_error(format!("saving container {}", self.id)))
    }
}

impl Engine {
    /// Gives a container another name.
    pub async fn rename(&self, name: &str, new: &str) -> Result<(), EngineError> {
        let container = self.find(name)?;
        let old = container.name();
        if old == new {
            return Err(EngineError::Invalid(format!(
                "Renaming a container with the same name as its current name: {new} is what it is called"
            )));
        }
        {
            let containers = self.lock();
            if let Some(other) = containers.values().find(|other| other.name() == new) {
                return Err(EngineError::NameTaken { name: new.to_owned(), id: other.id.clone() });
            }
            container.change(|config| new.clone_into(&mut config.name))?;
        }
        self.networks.rename(&container.id, &old, new).await;
        self.rename_kept(&container, &old).await;
        self.tell_container(&container, "rename", &[("oldName", format!("/{old}"))]);
        Ok(())
    }

    /// Changes a container's limits and restart policy, also while it runs.
    pub async fn update(
        &self,
        name: &str,
        limits: ResourceLimits,
        restart: Option<RestartPolicy>,
    ) -> Result<(), EngineError> {
        let container = self.find(name)?;
        let _one = container.operation.lock().await;
        let wanted = ContainerConfig { limits: limits.clone(), ..(*container.config()).clone() };
        if matches!(*container.state.borrow(), ContainerState::Running(_)) {
            let cgroup = self.cgroup(&container.id, &wanted);
            let (id, resources) = (container.id.clone(), spec::limits_of(&wanted));
            tokio::task::spawn_blocking(move || apply_limits(&id, &cgroup, resources))
                .await
                .map_err(io::Error::other)
                .flatten()
                .map_err(disk_error(format!("changing the limits of container {}", container.id)))?;
        }
        container.change(|config| {
            config.limits = limits;
            config.restart = restart.unwrap_or(config.restart);
        })?;
        self.tell_container(&container, "update", &[]);
        Ok(())
    }

    /// Bytes that a container has written to its own layer.
    #[must_use]
    pub fn container_size(&self, name: &str) -> u64 {
        let changed = self.find(name).map(|container| container.dirs.changed());
        changed.map_or(0, |changed| changed.map_or(0, |changed| disk::content(&changed)))
    }

    /// Says that a client has left a container's streams by its own wish.
    pub fn tell_detached(&self, id: &str) {
        if let Ok(container) = self.find(id) {
            self.tell_container(&container, "detach", &[]);
        }
    }

    /// The processes of a running container, as the host numbers them.
    pub fn processes(&self, name: &str) -> Result<Vec<i32>, EngineError> {
        let container = self.find(name)?;
        container.require_running()?;
        let cgroup = self.cgroup(&container.id, &container.config());
        let manager = cgroup_manager(&container.id, &cgroup);
        let pids = manager.and_then(|manager| manager.get_all_pids().map_err(io::Error::other));
        let pids = pids.map_err(disk_error(format!("listing the processes of container {}", container.id)))?;
        let mut pids: Vec<i32> = pids.into_iter().map(|pid| pid.as_raw()).collect();
        pids.sort_unstable();
        pids.dedup();
        self.tell_container(&container, "top", &[]);
        Ok(pids)
    }

    /// What a running container uses, as its cgroup counts it.
    pub fn usage(&self, name: &str) -> Result<Usage, EngineError> {
        let container = self.find(name)?;
        let doing = || disk_error(format!("measuring container {}", container.id));
        let cgroup = self.cgroup(&container.id, &container.config());
        let manager = cgroup_manager(&container.id, &cgroup).map_err(doing())?;
        manager.stats().map(Usage::from).map_err(io::Error::other).map_err(doing())
    }
}

fn cgroup_manager(id: &str, cgroup: &Path) -> io::Result<AnyCgroupManager> {
    let config = CgroupConfig { cgroup_path: cgroup.to_owned(), systemd_cgroup: false, container_name: id.to_owned() };
    create_cgroup_manager(config).map_err(io::Error::other)
}

fn apply_limits(id: &str, cgroup: &Path, limits: serde_json::Value) -> io::Result<()> {
    let resources: libcontainer::oci_spec::runtime::LinuxResources = serde_json::from_value(limits)?;
    let options =
        ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    let manager = cgroup_manager(id, cgroup)?;
    manager.apply(&options).map_err(io::Error::other)
}
