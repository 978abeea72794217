//! The devices that a container is to have: by their paths, by rules, and by names that vendors gave them.

use std::path::Path;

use serde::Deserialize;
use skep_engine::{Device, holds_device, is_cdi_name, is_device_rule};

use crate::http::ApiError;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct DeviceBody {
    path_on_host: String,
    path_in_container: String,
    cgroup_permissions: String,
}

/// Devices that a driver is asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct DeviceRequest {
    driver: String,
    #[serde(rename = "DeviceIDs")]
    ids: Vec<String>,
}

impl DeviceBody {
    pub(super) fn read(self) -> Result<Device, ApiError> {
        let host_path = self.path_on_host;
        if !Path::new(&host_path).exists() {
            return Err(ApiError::bad_request(format!(
                "error gathering device information: {host_path:?} is not there"
            )));
        }
        if !holds_device(&host_path) {
            return Err(ApiError::bad_request(format!(
                "error gathering device information: {host_path:?}: not a device node"
            )));
        }
        let access = if self.cgroup_permissions.is_empty() { "rwm".to_owned() } else { self.cgroup_permissions };
        if !access.chars().all(|letter| "rwm".contains(letter)) {
            return Err(ApiError::bad_request(format!("invalid device mode {access:?}: it is made of r, w and m")));
        }
        let path = if self.path_in_container.is_empty() { host_path.clone() } else { self.path_in_container };
        Ok(Device { host_path, path, access })
    }
}

/// The names that devices are asked for by; there is no driver but the one that knows them.
pub(super) fn named(requests: Vec<DeviceRequest>) -> Result<Vec<String>, ApiError> {
    let mut names = Vec::new();
    for request in requests {
        if request.driver != "cdi" {
            return Err(ApiError::unsupported(
                "--gpus: give the devices by --device, by their paths or by a name such as nvidia.com/gpu=all (CDI), since \
                 asking drivers for them is not supported yet",
            ));
        }
        if let Some(wrong) = request.ids.iter().find(|name| !is_cdi_name(name)) {
            return Err(ApiError::bad_request(format!("{wrong:?} is no name of a device: write VENDOR/CLASS=NAME")));
        }
        names.extend(request.ids);
    }
    Ok(names)
}

pub(super) fn rules(rules: Vec<String>) -> Result<Vec<String>, ApiError> {
    match rules.iter().find(|rule| !is_device_rule(rule)) {
        Some(rule) => Err(ApiError::bad_request(format!("invalid device cgroup rule {rule:?}: write 'c 10:200 rwm'"))),
        None => Ok(rules),
    }
}
