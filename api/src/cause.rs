//! Errors with their causes in one text, for where an error leaves the program.

use std::error::Error;

/// The error's text and its causes', each said once.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        #[source]
        cause: Option<Box<Self>>,
    }

    #[test]
    fn causes_follow_and_repetitions_do_not() {
        let layer = |text, cause: Option<Layer>| Layer { text, cause: cause.map(Box::new) };
        let error = layer("a failed", Some(layer("b failed", Some(layer("a failed", None)))));
        assert_eq!(with_causes(&error), "a failed: b failed");
    }
}
