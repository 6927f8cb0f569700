"""``make chaos``: kills commands at random moments and at every place where state becomes visible, and says how many were survived.

``ARGS="--kills 500 --seed 1 --only merge,compress"``. Nothing but the standard library may be imported here: every killed process begins
with what this file imports.
"""

if __name__ == "__main__":
    from tests.chaos.command import main

    main()
