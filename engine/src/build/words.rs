//! Words of a Dockerfile: how they are split, what quotes do, and what variables become.

/// Reads `NAME[=DEFAULT]`, as ARG has it.
pub(crate) fn arg(word: &str) -> Result<(&str, Option<&str>), String> {
    let (name, default) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
    if name.is_empty() { Err("ARG names can not be blank".into()) } else { Ok((name, default)) }
}

/// Splits at blanks; quotes and backslashes keep words together and are kept themselves.
pub(crate) fn split(text: &str, escape: char) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, c) if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (quote, c) if c == escape && quote != Some('\'') => {
                word.push(c);
                word.extend(chars.next());
                continue;
            }
            _ => {}
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Takes quotes off and puts variables in: `$name`, `${name}`, and with `:-`, `-`, `:+`, `+`, `:?` and
/// `?` as shells have them.
pub(crate) fn expand(word: &str, escape: char, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let chars: Vec<char> = word.chars().collect();
    let mut expander = Expander { chars: &chars, at: 0, escape, lookup };
    expander.until(None)
}

/// Puts variables into a text; quotes are its own.
pub(crate) fn expand_text(text: &str, escape: char, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let chars: Vec<char> = text.chars().collect();
    let mut expander = Expander { chars: &chars, at: 0, escape, lookup };
    let mut out = String::new();
    while let Some(c) = expander.next() {
        match c {
            '$' => out += &expander.variable()?,
            c if c == escape && matches!(expander.peek(), Some('$')) => out.extend(expander.next()),
            c => out.push(c),
        }
    }
    Ok(out)
}

struct Expander<'a> {
    chars: &'a [char],
    at: usize,
    escape: char,
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl Expander<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.chars.get(self.at).copied();
        self.at += 1;
        c
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn until(&mut self, end: Option<char>) -> Result<String, String> {
        let mut out = String::new();
        while let Some(c) = self.next() {
            match c {
                c if Some(c) == end => return Ok(out),
                '\'' if end != Some('"') => loop {
                    match self.next() {
                        Some('\'') => break,
                        Some(c) => out.push(c),
                        None => return Err("a single quote is not closed".into()),
                    }
                },
                '"' => out += &self.until(Some('"'))?,
                '$' => out += &self.variable()?,
                c if c == self.escape => match self.next() {
                    // Within quotes it stands for itself unless something needs it.
                    Some(c) if end == Some('"') && !matches!(c, '"' | '$') && c != self.escape => {
                        out.push(self.escape);
                        out.push(c);
                    }
                    Some(c) => out.push(c),
                    None => out.push(self.escape),
                },
                c => out.push(c),
            }
        }
        match end {
            None => Ok(out),
            Some(end) => Err(format!("{end} is missing")),
        }
    }

    fn variable(&mut self) -> Result<String, String> {
        if self.peek() != Some('{') {
            let name = self.name();
            return Ok(if name.is_empty() { "$".into() } else { (self.lookup)(&name).unwrap_or_default() });
        }
        self.next();
        let name = self.name();
        if name.is_empty() {
            return Err("${ without a name: bad substitution".into());
        }
        let value = (self.lookup)(&name);
        let (with_empty, operator) = match self.next() {
            Some('}') => return Ok(value.unwrap_or_default()),
            Some(':') => (true, self.next()),
            other => (false, other),
        };
        let word = self.until(Some('}'))?;
        let set = value.as_ref().is_some_and(|value| !with_empty || !value.is_empty());
        match operator {
            Some('-') => Ok(if set { value.unwrap_or_default() } else { word }),
            Some('+') => Ok(if set { word } else { String::new() }),
            Some('?') if set => Ok(value.unwrap_or_default()),
            Some('?') => Err(format!("{name}: {}", if word.is_empty() { "is not set".into() } else { word })),
            other => Err(format!("unsupported modifier {other:?} in substitution of {name}")),
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.peek().filter(|c| c.is_ascii_alphanumeric() || *c == '_') {
            if name.is_empty() && c.is_ascii_digit() {
                self.next();
                return c.to_string();
            }
            name.push(c);
            self.next();
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(word: &str, want: &str) {
        let lookup = |name: &str| match name {
            "a" => Some("x".to_owned()),
            "empty" => Some(String::new()),
            _ => None,
        };
        assert_eq!(expand(word, '\\', &lookup).unwrap_or_else(|error| format!("! {error}")), want, "{word}");
    }

    #[test]
    fn variables_and_quotes_are_as_in_a_shell() {
        check("$a/${a}b$none", "x/xb");
        check("'$a' \"$a\"", "$a x");
        check("\\$a", "$a");
        check("${none:-y}${empty:-z}${empty-w}", "yz");
        check("${a:+set}${none:+set}", "set");
        check("${none:-${a}}", "x");
        check("${none:?gone}", "! none: gone");
        check("$", "$");
        check("\"open", "! \" is missing");
    }

    #[test]
    fn quotes_keep_words_together() {
        assert_eq!(split(r#"a="b c" d\ e 'f g'"#, '\\'), [r#"a="b c""#, r"d\ e", "'f g'"]);
    }
}
