//! Secrets: payloads that only the tasks which use them may read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::container::Driver;
use crate::expansion::TEMPLATE_DRIVER;
use crate::id::SecretId;
use crate::name::{NameError, check_object_name};
use crate::object::Meta;
use crate::secret_bytes::SecretBytes;
use crate::template;

/// The largest secret, in bytes: 500 KiB are one too many.
pub const SECRET_LEN_MAX: usize = 500 * 1024 - 1;

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SecretSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// Never written to a client: it is taken out before a secret is shown.
    #[serde(skip_serializing)]
    pub data: SecretBytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<Driver>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub templating: Option<Driver>,
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Secret {
    #[serde(rename = "ID")]
    pub id: SecretId,
    #[serde(flatten)]
    pub meta: Meta,
    pub spec: SecretSpec,
}

/// Why a secret or a config is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PayloadError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{kind} {name} is empty: it needs at least one byte")]
    Empty { kind: &'static str, name: String },
    #[error("{kind} {name} has {len} bytes, at most {len_max} are allowed")]
    TooLarge { kind: &'static str, name: String, len: usize, len_max: usize },
    #[error("{kind} {name}: {what} is not supported yet")]
    Unsupported { kind: &'static str, name: String, what: &'static str },
    #[error("{kind} {name} cannot be filled in: {why}")]
    Template { kind: &'static str, name: String, why: String },
}

pub(crate) fn check_payload(
    kind: &'static str,
    name: &str,
    data: &SecretBytes,
    len_max: usize,
    templating: Option<&Driver>,
) -> Result<(), PayloadError> {
    check_object_name(kind, name)?;
    let name = name.to_owned();
    match data.len() {
        0 => return Err(PayloadError::Empty { kind, name }),
        len if len > len_max => return Err(PayloadError::TooLarge { kind, name, len, len_max }),
        _ => {}
    }
    let Some(driver) = templating else { return Ok(()) };
    let checked = match (driver.name.as_str(), std::str::from_utf8(data.expose())) {
        (TEMPLATE_DRIVER, Ok(text)) => template::check(text).map_err(|error| error.to_string()),
        (TEMPLATE_DRIVER, Err(_)) => Err("a template is text in UTF-8".into()),
        (other, _) => Err(format!("unrecognized template driver {other:?}: use {TEMPLATE_DRIVER}")),
    };
    checked.map_err(|why| PayloadError::Template { kind, name, why })
}

impl SecretSpec {
    pub fn validate(&self) -> Result<(), PayloadError> {
        if self.driver.is_some() {
            let (kind, name) = ("secret", self.name.clone());
            return Err(PayloadError::Unsupported { kind, name, what: "a secret driver" });
        }
        check_payload("secret", &self.name, &self.data, SECRET_LEN_MAX, self.templating.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(len: usize, want: Result<(), &str>) {
        let spec = SecretSpec { name: "s".into(), data: SecretBytes::new(vec![7; len]), ..SecretSpec::default() };
        match (spec.validate(), want) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(part)) if error.to_string().contains(part) => {}
            (got, want) => panic!("{got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn a_secret_has_from_one_byte_to_just_under_500_kib() {
        check(0, Err("empty"));
        check(1, Ok(()));
        check(500 * 1024 - 1, Ok(()));
        check(500 * 1024, Err("at most 511999"));
    }

    #[test]
    fn a_secret_is_not_written_to_json() {
        let spec = SecretSpec { name: "s".into(), data: SecretBytes::new(b"x".to_vec()), ..SecretSpec::default() };
        assert!(!serde_json::to_string(&spec).unwrap().contains("Data"));
    }
}
