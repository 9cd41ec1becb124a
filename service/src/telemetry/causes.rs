//! An error with its causes, each said once.

use std::error::Error;

/// The error and its sources, from the outermost to the innermost. A source is left out where the text before has it
/// already: many libraries repeat it in the error's own text.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let said = source.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(thiserror::Error, Debug)]
    enum Fault {
        #[error("refused")]
        Innermost,
        #[error("repeats: {0}")]
        Repeats(#[source] Box<Self>),
        #[error("adds")]
        Adds(#[source] Box<Self>),
    }

    #[test]
    fn a_cause_is_said_once_whether_or_not_the_error_repeats_it() {
        let repeated = Fault::Repeats(Box::new(Fault::Repeats(Box::new(Fault::Innermost))));
        assert_eq!(causes(&repeated), "repeats: repeats: refused");
        let added = Fault::Adds(Box::new(Fault::Repeats(Box::new(Fault::Innermost))));
        assert_eq!(causes(&added), "adds: repeats: refused");
    }
}
