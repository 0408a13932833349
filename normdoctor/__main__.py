"""python -m normdoctor"""

from normdoctor.cli import main

if __name__ == "__main__":
    main()
