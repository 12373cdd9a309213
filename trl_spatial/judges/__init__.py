"""Who answers about an image: rules, detectors, checkers of scenes."""
