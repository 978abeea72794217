//! Configs: files handed to tasks that anyone may read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::container::Driver;
use crate::id::ConfigId;
use crate::object::Meta;
use crate::secret::{PayloadError, check_payload};
use crate::secret_bytes::SecretBytes;

/// The largest config, in bytes: 1000 KiB are one too many.
pub const CONFIG_LEN_MAX: usize = 1000 * 1024 - 1;

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ConfigSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub data: SecretBytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub templating: Option<Driver>,
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    #[serde(rename = "ID")]
    pub id: ConfigId,
    #[serde(flatten)]
    pub meta: Meta,
    pub spec: ConfigSpec,
}

impl ConfigSpec {
    pub fn validate(&self) -> Result<(), PayloadError> {
        check_payload("config", &self.name, &self.data, CONFIG_LEN_MAX, self.templating.as_ref())
    }
}
